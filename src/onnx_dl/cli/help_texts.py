"""Help texts of the commands: one line each, a description, and examples."""

from __future__ import annotations

from typing import Final, NamedTuple


class HelpText(NamedTuple):
    """Help of one command.

    Attributes:
        summary: one line for ``onnx-dl --help``.
        description: more lines for ``onnx-dl COMMAND --help``.
        examples: command lines, each with a comment.
    """

    summary: str
    description: str
    examples: str


WHOLE: Final = HelpText(
    "",
    "Runs the models of onnxruntime sessions in worker processes, which give back all\n"
    "their memory when a model is unloaded.",
    "onnx-dl demo                      # see it work, in about 20 seconds\n"
    "onnx-dl run --ttl 60 app.py       # run a program that uses onnxruntime\n"
    "onnx-dl load asr.onnx --ttl 5m    # load a model into a shared host\n"
    "onnx-dl ps                        # list the models of the shared host\n"
    "\n"
    "onnx-dl COMMAND --help describes one command.",
)
COMMANDS: Final = {
    "demo": HelpText(
        "compare four models in worker processes and in-process",
        "Loads, uses and unloads four small models, first in worker processes and then\n"
        "in-process, and prints memory and times side by side. It needs no network and\n"
        "takes about 20 seconds.",
        "onnx-dl demo",
    ),
    "run": HelpText(
        "run a program with its models in worker processes",
        "Runs a program as python does. Each onnxruntime.InferenceSession in it becomes a\n"
        "proxy: its model runs in a worker process. The program needs no change. Options\n"
        "of onnx-dl come first. PROGRAM is written as after python: a file,\n"
        "-m MODULE, -c CODE or -. All words after it are arguments of the program.",
        "onnx-dl run app.py --port 8000\n"
        "onnx-dl run --ttl 60 --set 'vad*.onnx:ttl=-1' app.py\n"
        "onnx-dl run --memory-limit 2GiB -m package",
    ),
    "supervise": HelpText(
        "run a shared host in the foreground",
        "Runs a host that several applications share, until Ctrl-C, SIGTERM or\n"
        "onnx-dl stop, and prints its events. Service managers run this command.",
        "onnx-dl supervise --memory-limit 4GiB\n"
        "onnx-dl supervise --host web --config host.toml --metrics 127.0.0.1:9464",
    ),
    "serve": HelpText(
        "serve models over HTTP and gRPC to Triton's clients",
        "Serves models by the Open Inference Protocol, over HTTP and gRPC, until\n"
        "Ctrl-C or SIGTERM; then it finishes the requests that run. A model loads at\n"
        "its first request, and unloads after five minutes without one.\n"
        'Needs: pip install "onnx-dl[serve]"',
        "onnx-dl serve --demo\n"
        "onnx-dl serve --model digits=digits.onnx\n"
        "onnx-dl serve --repository models --memory-limit 4GiB\n"
        "onnx-dl serve --config host.toml --http 0.0.0.0:8000 --token-file tokens",
    ),
    "ps": HelpText(
        "list the models of a shared host",
        "Lists the models of a shared host with state, idle time, TTL, memory and calls.\n"
        "It loads nothing and restarts no timer.",
        "onnx-dl ps\nonnx-dl ps --host web --json",
    ),
    "top": HelpText(
        "show the models of a shared host, updated until Ctrl-C",
        "Shows the table of onnx-dl ps and memory over time, and updates both until\n"
        "Ctrl-C. It loads nothing and restarts no timer.",
        "onnx-dl top\nonnx-dl top --interval 500ms",
    ),
    "events": HelpText(
        "print the last events of a shared host",
        "Prints the last events of a shared host, such as loads and unloads, one per\n"
        "line, and ends. With --follow it goes on with new events.",
        "onnx-dl events                 # all events that the host keeps: the last 300\n"
        "onnx-dl events -n 20           # the last 20\n"
        "onnx-dl events --follow        # the last 10, then new ones\n"
        "onnx-dl events -f -n 0 --json  # new ones only, as JSON",
    ),
    "load": HelpText(
        "load a model into a shared host and keep it loaded",
        "Loads a model into a shared host, which keeps it after this command has ended.\n"
        "Starts the host if none runs. The host may evict the model if other models need\n"
        "its memory; onnx-dl pin prevents that.",
        "onnx-dl load asr.onnx\nonnx-dl load asr.onnx --ttl 5m --env OMP_NUM_THREADS=2",
    ),
    "pin": HelpText(
        "load a model that is never evicted",
        "Loads a model into a shared host as onnx-dl load does. The host never evicts it\n"
        "to make room for other models. onnx-dl unload ends it.",
        "onnx-dl pin vad.onnx",
    ),
    "unload": HelpText(
        "unload a model",
        "Unloads a model for all its users, after running calls have ended. Its next use\n"
        "loads it again. Unloading a model that is not loaded succeeds.",
        "onnx-dl unload asr.onnx\nonnx-dl unload asr.onnx --force",
    ),
    "stop": HelpText(
        "end a shared host and all its models",
        "Ends a shared host and all its models, for all users, and waits until its\n"
        "processes are gone. Running calls have 5 seconds to end (ONNX_DL_EXIT_GRACE).",
        "onnx-dl stop\nonnx-dl stop --host web",
    ),
    "cache": HelpText(
        "list or clear the load cache",
        "The load cache has models on disk in the form that loads fastest. onnx-dl fills\n"
        "it by itself. ONNX_DL_CACHE=off turns it off.",
        "onnx-dl cache ls\nonnx-dl cache clear",
    ),
    "doctor": HelpText(
        "check the installation",
        "Checks Python, onnxruntime and its providers, GPU, limits, hosts, the start\n"
        "of workers and the sandbox, and gives advice. The exit code is 1 if there is a\n"
        "problem.",
        "onnx-dl doctor\nonnx-dl doctor --json",
    ),
    "completion": HelpText(
        "print shell completion for bash, zsh or tcsh",
        "Prints a script that completes commands, options and files.",
        'eval "$(onnx-dl completion bash)"     # in ~/.bashrc\n'
        "onnx-dl completion zsh > ~/.zfunc/_onnx-dl   # a folder in fpath",
    ),
}
