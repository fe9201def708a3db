"""Options with which a server must not start, or that may not be meant.  Pure."""

from __future__ import annotations

from onnx_dl.server.auth import addresses
from onnx_dl.server.options import ServeOptions


def refusal(options: ServeOptions) -> str | None:
    """One sentence on why the server does not start; None: it may."""
    for option, address in _listeners(options).items():
        parts = addresses.parsed(address)
        if parts is None or parts.port is None:
            return f"{option} {address}: this is no address. Use HOST:PORT, or [ADDRESS]:PORT for IPv6."
    if bool(options.tls_cert) != bool(options.tls_key):
        return "--tls-cert and --tls-key need each other."
    if options.tls_ca and not options.tls_cert:
        return "--tls-ca needs --tls-cert and --tls-key: without TLS no client shows a certificate."
    if options.token_file and options.insecure:
        return "--token-file and --insecure exclude each other."
    open_to_all = [f"{option} {address}" for option, address in _others(options).items()]
    if open_to_all and not (options.token_file or options.tls_ca or options.insecure):
        return (
            f"{open_to_all[0]} can be reached from other machines. Say who may use it: --token-file FILE, or "
            "--tls-ca FILE (clients show a certificate), or --insecure (everyone)."
        )
    reachable = [option for option in _others(options) if option != "--metrics"]
    if options.client_shm != "off" and reachable:
        return (
            f"--client-shm {options.client_shm} needs {reachable[0]} on a loopback address: it gives clients "
            "the shared memory of this machine."
        )
    return None


def warnings(options: ServeOptions) -> list[str]:
    """Sentences on what is allowed, but may not be meant."""
    others = _others(options)
    found = []
    if options.insecure and others:
        found.append(f"{', '.join(others.values())}: everyone who reaches it may use it (--insecure).")
    if options.token_file and others and not options.tls_cert:
        found.append(
            f"{', '.join(others.values())}: tokens are sent unencrypted, because there is no --tls-cert."
        )
    return found


def _listeners(options: ServeOptions) -> dict[str, str]:
    """Addresses that are served, by option."""
    found = {"--http": options.http, "--grpc": options.grpc, "--metrics": options.metrics}
    return {option: address for option, address in found.items() if address}


def _others(options: ServeOptions) -> dict[str, str]:
    """Addresses that can be reached from other machines."""
    found = {}
    for option, address in _listeners(options).items():
        parts = addresses.parsed(address)
        if parts is None or not addresses.is_loopback(parts.host):
            found[option] = address
    return found
