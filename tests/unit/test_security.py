"""What a user points at is data: nothing that it holds is run, and no path that it names leaves its folder."""

import ast
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.conversion.torch_dist import CheckpointReader
from mpo_megatron.errors import CheckpointError, ConfigError
from mpo_megatron.pretrained import load_tokenizer
from tests.helpers.models import make_llama
from tests.unit.conversion.test_torch_dist import write

ROOT = Path(__file__).resolve().parents[2]
# What ranks of one run, or a rank and its own forks, tell each other; and the restricted reader.
PICKLES = {
    "mpo_megatron/runtime/meeting.py",
    "mpo_megatron/conversion/safe_pickle.py",
    "mpo_megatron/training/write_results.py",
}


def dangers(source: str, path: str = "") -> list[str]:
    """Calls in Python source that run what data hold, or a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("pickle.load", "pickle.loads", "pickle.Unpickler") and path not in PICKLES:
                found.append(f"{path}:{node.lineno}: {name}")
            if name.endswith("torch.load") and options.get("weights_only") != "True":
                found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
            if name in (
                "eval",
                "exec",
                "os.system",
                "os.popen",
                "yaml.load",
                "yaml.unsafe_load",
                "subprocess.getoutput",
            ):
                found.append(f"{path}:{node.lineno}: {name}")
            for option in ("shell", "allow_pickle", "trust_remote_code"):
                if options.get(option, "False") != "False":
                    found.append(f"{path}:{node.lineno}: {option}={options[option]}")
            if (
                name.startswith("Auto")
                and name.endswith(".from_pretrained")
                and "trust_remote_code" not in options
            ):
                found.append(f"{path}:{node.lineno}: {name} asks on a terminal whether to run code")
    return found


def test_nothing_runs_what_data_hold() -> None:
    files = [
        file
        for folder in ("mpo_megatron", "tools", "examples")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    files = [file for file in files if ".work" not in file.parts]
    assert len(files) > 100
    found = [
        danger for file in files for danger in dangers(file.read_text(), file.relative_to(ROOT).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=trust)",
        "AutoTokenizer.from_pretrained(p)",
        "subprocess.run(c, shell=True)",
        "os.system(c)",
        "yaml.load(f)",
        "eval(s)",
    ],
)
def test_a_danger_is_found(source: str) -> None:
    assert len(dangers(source)) == 1


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_the_index_of_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", 3, 8, 6)
    index = folder / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = Touch(tmp_path / "run")
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"is no index of a checkpoint: it asks for posix\.mkdir, which could run"
    ):
        CheckpointReader(folder)
    assert not (tmp_path / "run").exists()
    pickle.loads(index.read_bytes())
    assert (tmp_path / "run").exists(), "otherwise nothing was there to be run"


def test_a_name_with_dots_is_no_way_around(tmp_path: Path) -> None:
    """Protocol 4 takes attributes of what a module has."""
    folder = write(tmp_path / "checkpoint", 3, 8, 6)
    (folder / ".metadata").write_bytes(
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.getcwd\x93)R."
    )
    with pytest.raises(CheckpointError, match="asks for"):
        CheckpointReader(folder)


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "a/../../outside.distcp"])
def test_an_index_names_no_file_outside(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", 3, 8, 6)
    (tmp_path / "outside.distcp").write_bytes(bytes(10**6))
    index = folder / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = name
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names .*, which is outside of the checkpoint"):
        CheckpointReader(folder)


def test_a_folders_own_code_is_not_run(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run')!r})\nclass Mine: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
    )
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no tokenizer can be loaded from"):
        load_tokenizer(folder)
    assert not (tmp_path / "run").exists()
