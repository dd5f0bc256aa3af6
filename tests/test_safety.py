"""What strangers wrote runs no code, leaves no folder, controls no terminal; what travels has no path and no token."""

import ast
import json
import logging
import shutil
from pathlib import Path

import pytest
from PIL import Image

import hf_transfer as ht
from hf_transfer.cli import main
from hf_transfer.errors import make_printable
from hf_transfer.logs import make_log_handler
from hf_transfer.network.adapters import load_adapted
from hf_transfer.network.source import find_source

PACKAGE = Path(ht.__file__).parent
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}  # modules
UNSAFE_CALLS = {"eval", "exec", "compile", "unsafe_load", "full_load", "load_all", "os.system", "os.popen", "yaml.load"}


def find_unsafe(source: str) -> list[str]:
    """What in the source code could run code that a file contains."""
    unsafe = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            unsafe += [name for name in names if name.split(".")[0] in UNPICKLES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_unsafe = (
            name in UNSAFE_CALLS
            or (name == "torch.load" and arguments.get("weights_only") != "True")
            or arguments.get("allow_pickle", "False") != "False"
            or arguments.get("shell", "False") != "False"
            or arguments.get("trust_remote_code") == "True"
        )
        unsafe += [name] if is_unsafe else []
    return unsafe


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
        "np.load(f, allow_pickle=True)", "yaml.load(f)", "subprocess.run(x, shell=True)", "load(x, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_unsafe_code_is_recognized(code: str) -> None:
    assert find_unsafe(code)


def test_the_package_unpickles_nothing_and_runs_no_code_of_files() -> None:
    unsafe = {file.relative_to(PACKAGE).as_posix(): find_unsafe(file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert {file: names for file, names in unsafe.items() if names} == {}


def test_remote_code_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PACKAGE / "assets" / "embedded", folder)
    (folder / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "code.Processor"}}')
    find_source(str(folder))
    assert not caplog.records
    find_source(str(folder), trust_remote_code=True)
    assert "model (a local folder), because of trust_remote_code: code.py" in caplog.text


def test_a_strangers_run_runs_no_code_unless_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    shutil.copytree(PACKAGE / "assets" / "embedded", folder)
    (folder.parent / "results.json").write_text("{}")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": auto_map}))
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        _ = ht.load_run(folder.parent).backbone
    assert not ran.exists()


def test_an_adapter_is_not_loaded_from_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    (tmp_path / "task.json").write_text('{"label_names": ["a", "b"], "classifier": "fc", "base_weights": "0"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        load_adapted(tmp_path)


NAMES = ("<script>`x`</script>\n---", "../../../up", "\x1b[31mred\x1b[0m", "\u202egnp.exe")


def test_no_name_controls_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_printable("Katze 猫 👩\u200d🔬") == "Katze 猫 👩\u200d🔬"
    handler = make_log_handler()
    for name in NAMES:
        handler.emit(logging.LogRecord("x", logging.INFO, "x", 1, "skipped %s", (name,), None))
    shown = capsys.readouterr().err
    assert not {"\x1b", "\u202e"} & set(shown)
    assert "\\x1b[31mred" in shown


def test_a_run_stays_in_its_folder_and_names_no_path_and_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With names of strangers as classes, and everything below the home folder of a user with a token."""
    home, token = tmp_path / "home" / "jane-doe-1815", "hf_" + "secretTOKEN" * 3
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", token)
    shutil.copytree(PACKAGE / "assets" / "embedded", home / "upstream")
    files = []
    for c, name in enumerate(NAMES):
        for i in range(4):
            files.append((home / "photos" / f"{c}-{i}.png", name))
            files[-1][0].parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (60 * c, 20 * i, 0)).save(files[-1][0])
    before = set(tmp_path.rglob("*"))
    task = ht.Task(files, str(home / "upstream"), dataset="photos", cache="none")
    task.fit(ht.linear_probe(readouts="none", cv_folds=1), output_dir=home / "run")
    model = home / "run" / "model"
    written = [path for path in set(tmp_path.rglob("*")) - before if path.is_file()]
    assert all(path.is_relative_to(home / "run") for path in written)
    assert {path.name for path in written} >= {"results.json", "report.html", "README.md", "config.json"}
    for path in written:
        content = path.read_bytes()
        assert token.encode() not in content
        is_local = path.name == "config.yaml"  # repeats the run on this machine
        assert is_local or not [word for word in (b"jane-doe-1815", bytes(tmp_path)) if word in content], path
    capsys.readouterr()
    main(["predict", str(model), str(files[0][0]), "--top_k", "4"])
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    assert not {"\x1b", "\u202e"} & set(shown)
