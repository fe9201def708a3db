"""host.toml: what is taken, what is refused on which line, and what its document says."""

from __future__ import annotations

import os
import re
import time
import tomllib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from onnx_dl.core.spec import Warmup
from onnx_dl.errors import ConfigError
from onnx_dl.ort import options
from onnx_dl.session.inference_session import InferenceSessionProxy
from onnx_dl.supervisor.hostfile import schema
from onnx_dl.supervisor.hostfile.reader import DTYPES, Configured, HostFile, parse, read
from tests.support.damage import damaged, replaced
from tests.unit.test_layers import loaded_by

PAGE = (Path(__file__).parents[4] / "docs" / "host-file.md").read_text()
VAD = '[models.vad]\npath = "vad.onnx"\n'
LONG = Path("models/of/others.onnx")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with two files that may be models: nobody looks into them."""
    for path in (tmp_path / "vad.onnx", tmp_path / LONG):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def one(text: str, base: Path) -> Configured:
    """The only model of a file."""
    (model,) = parse(text, str(base)).models.values()
    return model


def refusal(text: str, base: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, str(base))
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# --- what is taken -----------------------------------------------------------------------------------------


def test_an_empty_file(base):
    assert parse("", str(base)) == HostFile(
        memory_limit=None,
        gpu_memory_limit=None,
        room_timeout=None,
        load_timeout=None,
        metrics=None,
        models={},
    )


def test_the_host(base):
    found = parse(
        'memory_limit = "2GiB"\ngpu_memory_limit = 500\nroom_timeout = "1m"\nload_timeout = 2.5\n'
        'metrics = "127.0.0.1:9400"',
        str(base),
    )
    assert (found.memory_limit, found.gpu_memory_limit) == (2 << 30, 500)
    assert (found.room_timeout, found.load_timeout, found.metrics) == (60.0, 2.5, "127.0.0.1:9400")


def test_a_model_that_says_nothing(base):
    model = one(VAD, base)
    assert (model.name, model.terms.ttl, model.terms.pin, model.terms.priority) == ("vad", -1.0, False, 0)
    assert (model.eager, model.warmup, model.spec.group) == (False, {}, None)


def test_a_model_that_says_all(base):
    model = one(
        VAD + 'ttl = "90s"\npin = true\npriority = -3\neager = true\ngroup = "speech"\nmax_memory = "300MB"\n'
        'max_runs = 1000\nproviders = ["CPUExecutionProvider"]\nprovider_options = [{a = "b", c = 1}]\n'
        "warmup = {x = {shape = [1, 2]}}",
        base,
    )
    assert (model.terms.ttl, model.terms.pin, model.terms.priority, model.eager, model.spec.group) == (
        90.0,
        True,
        -3,
        True,
        "speech",
    )
    assert (model.spec.max_memory, model.spec.max_runs) == (300_000_000, 1000)
    assert model.spec.provider_options == [{"a": "b", "c": 1}]
    assert model.warmup == {"x": Warmup("float32", (1, 2), 0)}


TERMS = 'ttl = 0\npin = true\npriority = 7\nproviders = [["A", {b = 1}]]\noptions.logid = "common"\n'


def test_defaults(base):
    model = one(f"[defaults]\n{TERMS}{VAD}", base)
    assert (model.terms.ttl, model.terms.pin, model.terms.priority) == (0.0, True, 7)
    assert model.spec == one(f'{VAD}providers = [["A", {{b = 1}}]]\noptions.logid = "common"', base).spec


def test_a_model_overrides_defaults(base):
    own = 'ttl = -1\npin = false\npriority = 0\nproviders = ["C"]\noptions.logid = "own"\n'
    assert one(f"[defaults]\n{TERMS}{VAD}{own}", base) == one(VAD + own, base)


def test_options_are_merged_entry_by_entry(base):
    text = (
        '[defaults.options]\nlogid = "a"\nintra_op_num_threads = 1\nconfig = {"x.y" = "1", "z" = "2"}\n'
        f'{VAD}[models.vad.options]\nlogid = "b"\nconfig."x.y" = "3"'
    )
    assert one(text, base).spec.options == {
        "logid": "b",
        "intra_op_num_threads": 1,
        "config": {"x.y": "3", "z": "2"},
    }


def test_order_is_the_files(base):
    text = f'[models.z]\npath = "vad.onnx"\n[models.a]\npath = "{LONG}"\n'
    assert list(parse(text, str(base)).models) == ["z", "a"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_warm_up_of_each_dtype(dtype, base):
    found = one(f'{VAD}warmup.x = {{shape = [2, 0], dtype = "{dtype}"}}', base).warmup["x"]
    made = np.full(found.shape, found.fill, np.dtype(found.dtype))
    assert made.shape == (2, 0)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [("int8", -128), ("uint64", 2**64 - 1), ("float16", 1), ("float64", 0.5), ("bool", True), ("str", "a b")],
)
def test_fills(dtype, fill, base):
    text = str(fill).lower() if isinstance(fill, bool) else repr(fill)
    found = one(f'{VAD}warmup.x = {{shape = [2], dtype = "{dtype}", fill = {text}}}', base).warmup["x"]
    assert found.fill == fill
    made = np.full(found.shape, found.fill, object if dtype == "str" else dtype)
    assert made.tolist() == [fill, fill]


# --- the spec ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("", {}),
        ('providers = ["CPUExecutionProvider"]', {"providers": ["CPUExecutionProvider"]}),
        (
            'providers = [["A", {b = 1, c = "d"}], "E"]',
            {"providers": [("A", {"b": 1, "c": "d"}), "E"]},
        ),
        (
            'providers = ["A"]\nprovider_options = [{b = true, c = 1.5}]',
            {"providers": ["A"], "provider_options": [{"b": True, "c": 1.5}]},
        ),
        ('max_memory = "1GiB"\nmax_runs = 5', {"max_memory": "1GiB", "max_runs": 5}),
    ],
)
def test_spec_is_that_of_an_application_in_the_same_folder(text, how, base, monkeypatch):
    monkeypatch.chdir(base)
    proxy = InferenceSessionProxy(str(base / "vad.onnx"), **how)
    assert one(VAD + text, base).spec == proxy._handle.spec


def test_options_are_those_of_an_application(base, monkeypatch):
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(base)
    told = ort.SessionOptions()
    told.intra_op_num_threads = 3
    told.enable_profiling = True
    told.logid = "me"
    told.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    told.add_session_config_entry("session.intra_op.allow_spinning", "0")
    plain = InferenceSessionProxy(str(base / "vad.onnx"), told)._handle.spec.options
    text = (
        'intra_op_num_threads = 3\nenable_profiling = true\nlogid = "me"\n'
        'graph_optimization_level = "basic"\n'
        'config = {"session.intra_op.allow_spinning" = "0"}'
    )
    found = one(f"{VAD}[models.vad.options]\n{text}", base).spec.options
    assert found == {name: plain[name] for name in found} and len(found) == 5
    read_back = options.read_session_options(options.make_session_options(found))
    assert read_back == options.read_session_options(told)


def test_two_readings_are_equal_wherever_they_happen(base, monkeypatch):
    text = VAD + 'options.config.a = "b"\nproviders = ["A"]'
    before = parse(text, str(base))
    monkeypatch.chdir("/")
    assert parse(text, str(base)) == before
    assert before.models["vad"].spec.cwd == str(base)
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(before), type=HostFile)
    assert travelled == before


def test_a_file_that_changes_is_another_model(base):
    before = one(VAD, base).spec.key
    (base / "vad.onnx").write_bytes(b"other")
    assert one(VAD, base).spec.key != before


@pytest.mark.parametrize("path", ["{base}/vad.onnx", "~/vad.onnx", "models/../vad.onnx", "./vad.onnx"])
def test_paths(path, base, monkeypatch):
    monkeypatch.setenv("HOME", str(base))
    found = one(f'[models.vad]\npath = "{path.format(base=base)}"', base / "models" / "..").spec.path
    assert os.path.isabs(found) and os.path.samefile(found, base / "vad.onnx")


def test_session_options_are_all_there():
    names = schema.SessionTable.__struct_fields__
    assert set(names) == {*options.SESSION_FIELDS, "config"}


def test_names_of_choices_are_onnxruntimes(base):
    ort = pytest.importorskip("onnxruntime")
    for field, kind in options._ENUMS.items():
        choices = {name.lower(): name for name in getattr(ort, kind).__members__}
        short = {re.sub("^(ort_)(enable_)?", "", name): full for name, full in choices.items()}
        for text, full in [*short.items(), *((full, full) for full in choices.values())]:
            assert one(f'{VAD}options.{field} = "{text}"', base).spec.options[field] == full


# --- what is refused ---------------------------------------------------------------------------------------

REFUSED = [
    ("a =", 1, "this is not valid TOML: Invalid value"),
    ("# x\na = 1\n\na = 2", 4, "this is not valid TOML: Cannot overwrite a value"),
    ("a = [1,\n2\n\n", 2, "this is not valid TOML: Unclosed array"),
    ("a = " + "[" * 5000, 1, "this is nested more than 32 levels deep"),
    ("\na = " + "[" * 489 + "]" * 489, 2, "this is nested more than 32 levels deep"),
    ("\n\n" + "a." * 40 + "b = 1", 3, "this is nested more than 32 levels deep"),
    ("[" + "a." * 20 + "b]\n" + "c." * 20 + "d = 1", 2, "is nested more than 32 levels deep"),
    (f"[defaults]\nttl = 0x{'f' * 5000}", 2, "defaults.ttl is a number of more than 64 bits"),
    ('[defaults.options]\nlogid = "a\\u0000b"', 2, 'defaults.options.logid = "a\\u0000b" has a NUL in it'),
    ('"a\\u0000b" = 1', 1, "has a key with a NUL in it"),
    ('metrics = "nonsense"', 1, 'metrics = "nonsense" is not an address; write host:port'),
    ('metrics = "localhost:99999"', 1, "is not an address"),
    ("memory = 1", 1, "memory is not a known key; known here are: memory_limit, "),
    ('memory_limit = "much"', 1, 'memory_limit = "much" is not a size; write a number of bytes or'),
    (
        "gpu_memory_limit = 1.5",
        1,
        'gpu_memory_limit = 1.5 must be a number of bytes, text such as "2GiB", or a table',
    ),
    (f"memory_limit = {2**63}", 1, "is not a size"),
    (f'memory_limit = "{"9" * 400}"', 1, "is not a size"),
    ("\nroom_timeout = -1", 2, "room_timeout = -1 is not a time; write seconds from 0 to 1000000"),
    ("load_timeout = inf", 1, "is not a time"),
    ("load_timeout = true", 1, "load_timeout = true must be a number of seconds"),
    ("metrics = 9400", 1, "metrics = 9400 must be text in quotes"),
    ("models = 1", 1, "models = 1 must be a table: [models.NAME]"),
    ("[models]\nvad = 1", 2, "models.vad = 1 must be a table: [models.NAME]"),
    ('[defaults]\nttl = "fast"', 2, 'defaults.ttl = "fast" is not one of the three modes: -1 (stay'),
    ('[defaults]\neager = "x"', 2, "defaults.eager is not a known key; known here are: ttl, pin, "),
    ("[defaults.options]\nthreads = 1", 2, "defaults.options.threads is not a known key"),
    ("[models.vad]\nttl = 1", 1, "models.vad has no path; give it the path of a model file, in quotes"),
    ('[models.vad]\npath = ""', 2, 'models.vad.path = "" must be the path of a model file'),
    ('[models.vad]\npath = "none.onnx"', 2, 'models.vad.path = "none.onnx": there is no file /'),
    ('[models.vad]\npath = "models"', 2, "there is no file /"),
    ('[models.vad]\npath = "a\\u0000b"', 2, "has a NUL in it"),
    ('[models.""]\npath = "vad.onnx"', 1, 'models."" is not a name for a model'),
    ('[models."a/b"]\npath = "vad.onnx"', 1, 'models."a/b" is not a name for a model: use printable text'),
    ('[models."a\\\\b"]\npath = "vad.onnx"', 1, "is not a name for a model"),
    ('[models."a\\nb"]\npath = "vad.onnx"', 1, 'models."a\\nb" is not a name for a model'),
    ('[models.".."]\npath = "vad.onnx"', 1, "is not a name for a model"),
    (VAD + '\n\n\nttl = "fast"', 6, 'models.vad.ttl = "fast" is not one of the three modes: -1 (stay until'),
    (VAD + "ttl = -0.5", 3, "models.vad.ttl = -0.5 is not one of the three modes"),
    (VAD + "ttl = [1]", 3, "models.vad.ttl = [1] must be -1, 0, a number of seconds, or text"),
    (VAD + "ttl = 1979-05-27", 3, 'models.vad.ttl = "1979-05-27" must be -1, 0'),
    (VAD + 'pin = "yes"', 3, 'models.vad.pin = "yes" must be true or false'),
    (VAD + "eager = 1", 3, "models.vad.eager = 1 must be true or false"),
    (VAD + "priority = 1.0", 3, "models.vad.priority = 1.0 must be a whole number"),
    (VAD + "priority = 9999999999", 3, "must be a whole number of 32 bits"),
    (VAD + 'group = " "', 3, 'models.vad.group = " " is not a group name'),
    (VAD + "options.log_severity_level = 77", 3, "log_severity_level = 77 must be a number from 0 to 4"),
    (VAD + "options.intra_op_num_threads = 100000", 3, "must be a number of threads from 0 to 4096"),
    (VAD + "options.inter_op_num_threads = -1", 3, "must be a number of threads from 0 to 4096"),
    (VAD + 'options.config."" = "x"', 3, "by a key of 1 to 1024 characters"),
    (VAD + "warmup.x = {shape = [2147483647, 2147483647]}", 3, "has more items than memory can hold"),
    (VAD + f"warmup.x = {{shape = {[1] * 33}}}", 3, "must be a list of sizes"),
    (VAD + "group = 1", 3, "models.vad.group = 1 must be text in quotes"),
    (VAD + "colour = 1", 3, "models.vad.colour is not a known key; known here are: ttl, "),
    (VAD + 'max_memory = "x"', 3, 'models.vad.max_memory = "x" is not a size'),
    (VAD + "max_runs = 0", 3, "models.vad.max_runs = 0 must be a number of calls, 1 or more"),
    (VAD + 'providers = "CPUExecutionProvider"', 3, "must be a list of names, or of pairs such as"),
    (VAD + 'providers = ["A", 1]', 3, 'models.vad.providers = ["A", 1] must be a list of names'),
    (VAD + 'providers = [["A"]]', 3, "must be a list of names, or of pairs"),
    (VAD + 'providers = [["A", {b = [1]}]]', 3, "must be a list of names, or of pairs"),
    (VAD + "provider_options = [{}]", 3, "models.vad.provider_options has 1 tables for 0 providers"),
    (VAD + 'providers = ["A"]\nprovider_options = []', 4, "has 0 tables for 1 providers"),
    (VAD + 'providers = [["A", {}]]\nprovider_options = [{}]', 4, "is given twice"),
    (VAD + 'provider_options = {a = "b"}', 3, "must be a list of tables, one for each of the providers"),
    (VAD + "options = 1", 3, "models.vad.options = 1 must be a table of SessionOptions"),
    (VAD + 'options = {logid = "a",\tlogo = 1}', 3, "models.vad.options.logo is not a known key"),
    (VAD + "[models.vad.options]\n\nlogid = 1", 5, "models.vad.options.logid = 1 must be text in quotes"),
    (VAD + "options.intra_op_num_threads = '2'", 3, "must be a number of threads from 0 to 4096"),
    (VAD + 'options.execution_mode = "fast"', 3, 'must be one of "sequential" (ORT_SEQUENTIAL), "parallel"'),
    (VAD + "options.graph_optimization_level = 99", 3, 'must be one of "disable_all" (ORT_DISABLE_ALL)'),
    (
        VAD + '[models.vad.options.config]\na = "1"\n"session.x" = 0',
        5,
        'models.vad.options.config."session.x" = 0 must be text in quotes, such as',
    ),
    (VAD + "warmup = [1]", 3, "models.vad.warmup = [1] must be a table of inputs"),
    (VAD + "[models.vad.warmup]\nx = {shape = [1]}\ny = 3", 5, "models.vad.warmup.y = 3 must be a table of"),
    (VAD + 'warmup.x = {dtype = "int8"}', 3, "models.vad.warmup.x has no shape; give it a list of sizes"),
    (VAD + "warmup.x = {shape = [-1]}", 3, "models.vad.warmup.x.shape = [-1] must be a list of sizes"),
    (VAD + 'warmup.x = {shape = ["batch"]}', 3, "must be a list of sizes, such as [1, 3, 224, 224]"),
    (VAD + 'warmup.x = {shape = [1], dtype = "f4"}', 3, 'x.dtype = "f4" must be one of bool, int8, '),
    (
        VAD + 'warmup.x = {shape = [1], dtype = "uint8", fill = 256}',
        3,
        "x.fill = 256 is not a value of the dtype",
    ),
    (VAD + 'warmup.x = {shape = [1], dtype = "int64", fill = 0.5}', 3, "is not a value of the dtype int64"),
    (VAD + 'warmup.x = {shape = [1], dtype = "bool", fill = 2}', 3, "is not a value of the dtype bool"),
    (VAD + 'warmup.x = {shape = [1], fill = "a"}', 3, 'x.fill = "a" is not a value of the dtype float32'),
    (VAD + 'warmup.x = {shape = [1], dtype = "str", fill = 1}', 3, "is not a value of the dtype str"),
    (VAD + "warmup.x = {shape = [1], fill = []}", 3, "x.fill = [] must be a number, or text for str"),
    (
        VAD + '[models.other]\npath = "./vad.onnx"',
        3,
        "models.other is the same file with the same options as models.vad; use one name for it",
    ),
]


@pytest.mark.parametrize(("text", "line", "reason"), REFUSED, ids=[reason[:50] for *_, reason in REFUSED])
def test_refused(text, line, reason, base):
    told = refusal(text, base)
    assert re.match(rf"host\.toml, line {line}(, column \d+)?: ", told), told
    assert reason in told
    assert told.endswith(".") and not told.endswith("..")


ODD = [
    *(
        "0",
        "-1",
        "1",
        "true",
        "1.5",
        "nan",
        "inf",
        str(2**70),
        str(-(2**70)),
        '""',
        '"a"',
        '"A\\u0000"',
        "1979-05-27",
    ),
    *(
        "[]",
        "[1]",
        '["a"]',
        '[["a"]]',
        '[["a", {}]]',
        f'[["a", {{b = {2**70}}}]]',
        "[{}]",
        '[{a = "b"}]',
        "[{a = {}}]",
    ),
    *(
        "{}",
        '{a = "b"}',
        "{a = 1}",
        "{a = {}}",
        "{a = {shape = [1]}}",
        "{a = {shape = [], fill = nan}}",
        "[[[]]]",
    ),
]
PLACES = {
    "": schema.HostTable,
    "defaults.": schema.DefaultsTable,
    "models.vad.": schema.ModelTable,
    "defaults.options.": schema.SessionTable,
    "models.vad.warmup.x.": schema.InputTable,
}
KEYS = [place + key for place, kind in PLACES.items() for key in kind.__struct_fields__]


@pytest.mark.parametrize("key", KEYS)
def test_whatever_stands_there_is_taken_or_refused_by_name(key, base):
    """And what is taken can travel."""
    others = {"models.vad.path": '"vad.onnx"', "models.vad.warmup.x.shape": "[1]"}
    needed = {"models": {}, "models.vad.warmup": {"models.vad.path"}, "models.vad.path": set()}.get(
        key, others
    )
    for value in ODD:
        text = "\n".join(
            [*(f"{name} = {others[name]}" for name in needed if name != key), f"{key} = {value}"]
        )
        try:
            found = parse(text, str(base))
        except ConfigError as error:
            assert key in str(error), text
        else:
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=HostFile).models.keys() <= {
                "vad"
            }


def test_one_file_with_other_options_is_another_model(base):
    text = f'{VAD}[models.other]\npath = "vad.onnx"\noptions.intra_op_num_threads = 1'
    vad, other = parse(text, str(base)).models.values()
    assert vad.spec.key != other.spec.key


# --- files -------------------------------------------------------------------------------------------------


def test_reading_a_file(base, monkeypatch):
    (base / "my.toml").write_text(VAD)
    monkeypatch.chdir(base / "models")
    found = read("../my.toml")
    assert found == read(base / "my.toml") == parse(VAD, str(base))


def test_messages_name_the_file(base):
    file = base / "my.toml"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))} cannot be read: there is no such file"):
        read(file)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(base))} cannot be read: it is no file"):
        read(base)
    file.write_text("\nmemory_limit = 'x'")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}, line 2: memory_limit"):
        read(file)
    file.write_bytes(b"# \xe4\n\n# \xff")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}, line 1: this is not UTF-8"):
        read(file)


def test_what_is_no_regular_file_is_not_waited_for(base):
    os.mkfifo(base / "fifo")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(base / "fifo")


def test_a_mounted_file_begins_its_paths_where_it_is_mounted(base):
    (base / "..data").mkdir()
    (base / "..data" / "host.toml").write_text(VAD)
    (base / "host.toml").symlink_to("..data/host.toml")
    assert read(base / "host.toml").models["vad"].spec.path == str(base / "vad.onnx")


def test_a_supervisor_may_import_it():
    loaded = loaded_by("import onnx_dl.supervisor.hostfile.reader, onnx_dl.supervisor.hostfile.file_watch")
    assert "msgspec" in loaded and not loaded & {"numpy", "onnxruntime", "zmq"}


# --- the document ------------------------------------------------------------------------------------------


def tables() -> dict[str, dict[str, str]]:
    """Heading to key to default, as the document's tables have them."""
    found = re.split(r"^### (.+)$", PAGE, flags=re.MULTILINE)[1:]
    return {
        title.strip("`"): dict(re.findall(r"^\| `(\w+)` \|.*\| (.+?) \|$", text, flags=re.MULTILINE))
        for title, text in zip(found[::2], found[1::2], strict=True)
    }


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("The host", schema.HostTable),
        ("[defaults]", schema.DefaultsTable),
        ("[models.NAME]", schema.ModelTable),
        ("[serve]", schema.ServeTable),
        ("options", schema.SessionTable),
        ("warmup", schema.InputTable),
    ],
)
def test_the_tables_have_all_keys(title, kind):
    told = tables()[title]
    assert set(told) == set(kind.__struct_fields__)
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    assert {key for key, default in told.items() if default == "must be given"} == required


def test_the_defaults_are_as_told(base):
    """Where a default is a value, writing it down changes nothing."""
    told = tables()
    plain = one(VAD + "warmup.x.shape = [1]", base)
    for title, head in (("[defaults]", "[defaults]\n"), ("[models.NAME]", "")):
        values = {key: text.strip("`") for key, text in told[title].items() if text.startswith("`")}
        assert values
        for key, value in values.items():
            extra = f"{head}{key} = {value}\n"
            text = extra + VAD if head else VAD + extra
            assert one(f"{text}warmup.x.shape = [1]", base) == plain, key
    given = {key: text.strip("`") for key, text in told["warmup"].items() if text.startswith("`")}
    text = ", ".join(f"{key} = {value}" for key, value in given.items())
    assert one(f"{VAD}warmup.x = {{shape = [1], {text}}}", base) == plain


def test_the_example_is_a_file(base):
    (text,) = re.findall(r"```toml\n(.+?)```", PAGE, flags=re.DOTALL)
    for model in tomllib.loads(text)["models"].values():
        (base / model["path"]).parent.mkdir(parents=True, exist_ok=True)
        (base / model["path"]).write_bytes(b"")
    found = parse(text, str(base))
    assert found.memory_limit and found.metrics and len(found.models) > 1
    used = {key for model in tomllib.loads(text)["models"].values() for key in model}
    assert used == set(schema.ModelTable.__struct_fields__), "it shows every key of a model"


# --- damage ------------------------------------------------------------------------------------------------

STRANGE = [
    *(b"[", b"]", b"{", b"}", b"'", b'"', b'"""', b"'''", b"=", b".", b",", b"\n", b"\r", b"#", b"\\", b"\0"),
    *(b"\xff", b"\xf0\x9f\x98\x80", b"\xed\xa0\x80", b"1e999", b"nan", b"-inf", b"0x" + b"f" * 5000),
    *(b"9" * 400, b"9" * 5000, b"1979-05-27T07:32:00Z", b"'''a", b"a.a.", b"[[a]]\n", b"[a.b]\n", b"{a={"),
    *(b"\\u0000", b"\\ud800", b"models.vad.", b"defaults.options.", b"warmup.x.shape=", b"~nobody/\x7f"),
]


def example() -> str:
    (text,) = re.findall(r"```toml\n(.+?)```", PAGE, flags=re.DOTALL)
    return text


def check_damaged(seed: int, base: Path, file: Path) -> None:
    """It is taken, and can travel, or refused with file and line."""
    data = damaged(example().encode(), STRANGE, seed)[:100_000]
    if seed % 2:
        values = re.findall(r"= ([^\s\[{][^#\n]*?) *(?:#.*)?\n", example())
        data = replaced(example(), values, ODD, seed).encode()
    file.write_bytes(data)
    try:
        found = read(file)
    except ConfigError as error:
        assert re.match(rf"{re.escape(str(file))}, line \d+", str(error)), error
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=HostFile).models == found.models


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_whatever_a_file_becomes(first, base):
    for name in ("vad.onnx", "vision/detector.onnx"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"")
    for seed in range(first, first + 100):
        check_damaged(seed, base, base / "host.toml")


def test_a_mistake_in_a_long_array_is_found_soon(base):
    """In two seconds, if they were found line by line; 10 ms are usual."""
    lines = '  "CPUExecutionProvider",\n' * 1500
    began = time.process_time()
    assert "line 3:" in refusal(f"{VAD}providers = [\n{lines}1]\n", base)
    assert time.process_time() - began < 0.5


def test_a_file_that_is_too_large_is_not_read(base):
    with open(base / "large.toml", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match=r"large\.toml cannot be read: it has more than 1048576 bytes"):
        read(base / "large.toml")


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/mem", "a\0b"])
def test_what_is_no_file_of_its_own(path):
    with pytest.raises(ConfigError, match="cannot be read: "):
        read(path)
