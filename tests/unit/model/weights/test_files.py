"""Reading and writing files of weights, and what is said where there are none."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from coupalign.errors import InputError
from coupalign.model.weights.files import locate, read_tensors, read_weights, write_weights


def test_own_weights_round_trip(tmp_path):
    bias = torch.randn(5)
    state = {
        "bias": bias,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "tied": bias,
    }
    write_weights(tmp_path / "a" / "model.safetensors", state)
    write_weights(tmp_path / "b.safetensors", dict(reversed(state.items())))
    read = read_weights(tmp_path / "a" / "model.safetensors")
    assert read.keys() == state.keys() and all(
        torch.equal(read[name].double(), state[name].double()) for name in state
    )
    assert read["half"].dtype == torch.float32 and read["steps"].dtype == torch.int64
    assert (tmp_path / "b.safetensors").read_bytes() == (
        tmp_path / "a" / "model.safetensors"
    ).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model.safetensors"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_weights(tmp_path / "m.safetensors", {"a": torch.ones(2)})
    monkeypatch.setattr(
        "os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        write_weights(tmp_path / "m.safetensors", {"a": torch.zeros(2)})
    assert torch.equal(read_weights(tmp_path / "m.safetensors")["a"], torch.ones(2))
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_own_weights_name_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="no such file"):
        read_weights(path)
    write_weights(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        InputError, match=r"model.safetensors \(.* bytes\): not a whole safetensors file"
    ):
        read_weights(path)


@pytest.mark.parametrize(
    "content,match",
    [
        (b"<!DOCTYPE html> not found", "cannot be read as weights"),
        (b"", "0 bytes"),
        ({"optimizer": 3, "epoch": 4}, "no tensors by name in this file, only optimizer, epoch"),
        ([torch.zeros(2)], "a list"),
        ({"model": {"a": torch.zeros(1)}, "config": SimpleNamespace(lr=1)}, "weights_only=False"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(tmp_path, content, match, suffix):
    path = tmp_path / f"file{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(
        InputError, match=match if suffix == ".pth" else "not a whole safetensors file"
    ):
        read_tensors(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: {"module": {"model": state}},
    ],
)
def test_wrapped_state_dicts_are_opened(tmp_path, wrap):
    torch.save(wrap({"a.b": torch.ones(2), "step": 5}), tmp_path / "file.bin")
    tensors = read_tensors(tmp_path / "file.bin")
    assert tensors.keys() == {"a.b"} and torch.equal(tensors["a.b"], torch.ones(2))


def test_folders_prefer_safetensors(tmp_path):
    with pytest.raises(
        InputError,
        match="model.x: the folder .* holds neither model.safetensors nor pytorch_model.bin",
    ):
        locate(str(tmp_path), "model.x")
    (tmp_path / "pytorch_model.bin").touch()
    assert locate(str(tmp_path), "model.x") == tmp_path / "pytorch_model.bin"
    (tmp_path / "model.safetensors").touch()
    assert locate(str(tmp_path), "model.x") == tmp_path / "model.safetensors"
    assert locate(str(tmp_path / "pytorch_model.bin"), "model.x") == tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize(
    "source", ["/no/where", "./no", "../no/where", "~/no", "no.pth", "no/model.safetensors"]
)
def test_paths_are_not_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="model.x: there is no file or folder"):
        locate(source, "model.x")


def test_the_hub_is_asked_for_both_kinds_of_file_after_its_cache(tmp_path, monkeypatch):
    asked = []

    def download(repository, name, local_files_only):
        asked.append((name, local_files_only))
        if local_files_only and repository != "a/cached":
            raise LocalEntryNotFoundError("not cached")
        if name == "model.safetensors" or repository == "a/empty":
            raise RemoteEntryNotFoundError(
                "404", response=SimpleNamespace(headers={}, request=None)
            )
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert locate("a/model", "model.x") == tmp_path / "pytorch_model.bin"
    both = [
        ("model.safetensors", True),
        ("pytorch_model.bin", True),
        ("model.safetensors", False),
        ("pytorch_model.bin", False),
    ]
    assert asked == both
    asked.clear()
    assert locate("a/cached", "model.x") == tmp_path / "pytorch_model.bin"
    assert asked == both[:2], "a cached file needs no network"
    with pytest.raises(InputError, match="the hub's 'a/empty' holds neither"):
        locate("a/empty", "model.x")


def test_a_file_in_the_hubs_cache_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "0" * 40
    snapshot = tmp_path / "models--a--model" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--model" / "refs").mkdir()
    (tmp_path / "models--a--model" / "refs" / "main").write_text(revision)
    write_weights(snapshot / "model.safetensors", {"a": torch.ones(2)})
    assert torch.equal(read_tensors(locate("a/model", "model.x"))["a"], torch.ones(2))


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no connection\nsecond line"),
        OSError("no connection"),
        ValueError("no connection: no such name"),
    ],
)
def test_offline_says_what_to_fetch_and_where_to_put_it(monkeypatch, error):
    def download(repository, name, local_files_only):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError, match="no connection") as caught:
        locate("google-bert/bert-base-uncased", "model.text.weights")
    message = str(caught.value)
    assert "hf download google-bert/bert-base-uncased --local-dir bert-base-uncased" in message
    assert "set model.text.weights to its path" in message and "second line" not in message


def test_the_hubs_own_offline_mode_is_understood(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("bert-base-uncased", "no/such/name"):
        with pytest.raises(InputError, match=f"hf download {name}"):
            locate(name, "model.x")
