"""Finding, reading and writing files of weights, and the messages if there are none."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from coupalign.errors import InputError
from coupalign.model.weights.files import locate, read_tensors, read_weights, write_weights
from tests.hostile import FORMS, RunsCode, write_pickle

# ------------------------------------------------------------------------------- our own weights


def test_own_weights_round_trip(tmp_path):
    bias = torch.randn(5)
    state = {
        "bias": bias,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "tied": bias,
    }
    path = tmp_path / "a" / "model.safetensors"

    write_weights(path, state)
    read = read_weights(path)

    assert read.keys() == state.keys()
    assert all(torch.equal(read[name].double(), state[name].double()) for name in state)
    assert read["half"].dtype == torch.float32 and read["steps"].dtype == torch.int64
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]

    # The same tensors give the same bytes, in any order.
    write_weights(tmp_path / "b.safetensors", dict(reversed(state.items())))
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "m.safetensors"
    write_weights(path, {"a": torch.ones(2)})
    monkeypatch.setattr("os.fsync", fail)

    with pytest.raises(OSError, match="No space"):
        write_weights(path, {"a": torch.zeros(2)})

    assert torch.equal(read_weights(path)["a"], torch.ones(2))
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_own_weights_name_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="no such file"):
        read_weights(path)

    write_weights(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-7])

    message = r"model.safetensors \(.* bytes\): not a whole safetensors file"
    with pytest.raises(InputError, match=message):
        read_weights(path)


# ---------------------------------------------------------------------------------- other files


@pytest.mark.parametrize(
    "content, match",
    [
        (b"<!DOCTYPE html> not found", "cannot be read as weights"),
        (b"", "0 bytes"),
        ({"optimizer": 3, "epoch": 4}, "the file has no tensors by name, only optimizer, epoch"),
        ([torch.zeros(2)], "a list"),
        ({"model": {"a": torch.zeros(1)}, "config": SimpleNamespace(lr=1)}, "weights_only=False"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_without_weights_are_refused(tmp_path, content, match, suffix):
    path = tmp_path / f"file{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    if suffix == ".safetensors":
        match = "not a whole safetensors file"

    with pytest.raises(InputError, match=match):
        read_tensors(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar"])
def test_weights_that_run_code_are_refused(tmp_path, form, suffix):
    path, marker = tmp_path / f"file{suffix}", tmp_path / "ran"
    write_pickle(path, {"model": {"w": torch.zeros(3), "e": RunsCode(marker)}}, form)

    with pytest.raises(InputError, match="cannot be read as weights"):
        read_tensors(path)

    assert not marker.exists()


def test_long_names_in_a_file_are_cut(tmp_path):
    torch.save({"a" * 10_000: 1}, tmp_path / "file.pth")

    with pytest.raises(InputError) as caught:
        read_tensors(tmp_path / "file.pth")

    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: {"module": {"model": state}},
    ],
)
def test_wrapped_state_dicts_are_unwrapped(tmp_path, wrap):
    torch.save(wrap({"a.b": torch.ones(2), "step": 5}), tmp_path / "file.bin")

    tensors = read_tensors(tmp_path / "file.bin")

    assert tensors.keys() == {"a.b"} and torch.equal(tensors["a.b"], torch.ones(2))


def test_locate_prefers_safetensors_in_a_folder(tmp_path):
    empty = "model.x: the folder .* has neither model.safetensors nor pytorch_model.bin"
    with pytest.raises(InputError, match=empty):
        locate(str(tmp_path), "model.x")

    pickled, safe = tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    pickled.touch()
    assert locate(str(tmp_path), "model.x") == pickled

    safe.touch()
    assert locate(str(tmp_path), "model.x") == safe
    assert locate(str(pickled), "model.x") == pickled


# ---------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    "source", ["/no/where", "./no", "../no/where", "~/no", "no.pth", "no/model.safetensors"]
)
def test_paths_are_not_looked_up_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("asked the hub"))

    with pytest.raises(InputError, match="model.x: there is no file or folder"):
        locate(source, "model.x")


def test_hub_is_asked_for_both_file_names_after_its_cache(tmp_path, monkeypatch):
    asked = []

    def download(repository, name, local_files_only):
        asked.append((name, local_files_only))
        if local_files_only and repository != "a/cached":
            raise LocalEntryNotFoundError("not cached")
        if name == "model.safetensors" or repository == "a/empty":
            response = SimpleNamespace(headers={}, request=None)
            raise RemoteEntryNotFoundError("404", response=response)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    assert locate("a/model", "model.x") == tmp_path / "pytorch_model.bin"
    cache = [("model.safetensors", True), ("pytorch_model.bin", True)]
    hub = [("model.safetensors", False), ("pytorch_model.bin", False)]
    assert asked == cache + hub

    # A cached file needs no network.
    asked.clear()
    assert locate("a/cached", "model.x") == tmp_path / "pytorch_model.bin"
    assert asked == cache

    with pytest.raises(InputError, match="'a/empty' on the hub has neither"):
        locate("a/empty", "model.x")


def test_file_in_the_hub_cache_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "0" * 40
    repository = tmp_path / "models--a--model"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    write_weights(snapshot / "model.safetensors", {"a": torch.ones(2)})

    path = locate("a/model", "model.x")

    assert torch.equal(read_tensors(path)["a"], torch.ones(2))


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no connection\nsecond line"),
        OSError("no connection"),
        ValueError("no connection: no such name"),
    ],
)
def test_unreachable_hub_says_what_to_fetch_and_where_to_put_it(monkeypatch, error):
    def download(repository, name, local_files_only):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    with pytest.raises(InputError, match="no connection") as caught:
        locate("google-bert/bert-base-uncased", "model.text.weights")

    message = str(caught.value)
    assert "hf download google-bert/bert-base-uncased --local-dir bert-base-uncased" in message
    assert "set model.text.weights to its path" in message and "second line" not in message


def test_offline_mode_of_the_hub_is_understood(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    for name in ("bert-base-uncased", "no/such/name"):
        with pytest.raises(InputError, match=f"hf download {name}"):
            locate(name, "model.x")
