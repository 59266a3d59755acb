"""Where weights lie and how their files are read: local .safetensors, .pth, .pt, .bin and Darknet's, folders, the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from coupalign.errors import InputError
from coupalign.files import whole_file
from coupalign.model.weights.darknet import is_darknet, read_darknet

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("model", "state_dict", "module")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of `write_weights`, or any other .safetensors file, to the CPU.

    Raises:
        InputError: no such file, or not whole.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights")
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} ({path.stat().st_size} bytes): not a whole safetensors file ({error}). "
            f"Fetch or export it again."
        ) from error


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically: on the CPU, contiguous, floating point as fp32. Same tensors, same bytes."""
    plain = {name: _plain(tensor) for name, tensor in state.items()}
    with whole_file(Path(path)) as file:
        file.write(safetensors.torch.save(plain, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a local weights file by name; a wrapping {"model": ...} or {"state_dict": ...} is opened.

    Pickled files are read by torch's restricted unpickler, which runs no code of the file.

    Raises:
        InputError: not readable as weights, or no tensors inside.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    if is_darknet(path):
        return read_darknet(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise nearly every type there is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} ({path.stat().st_size} bytes): cannot be read as weights: {reason}\n"
            f"Where the file is damaged, fetch it again. Where it holds other objects beside the tensors and you trust it: "
            f"torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)"
        ) from error
    return _state_dict(content, path)


def locate(source: str, field: str) -> Path:
    """Find the weights file of a local file, a folder, or a hub name.

    Args:
        source: path of a file; of a folder with model.safetensors or pytorch_model.bin; of the folder text/ of a checkpoint of ours,
            which says the shape of weights that lie beside it; or a Hugging Face hub name.
        field: the config field `source` is from, for messages.

    Raises:
        InputError: nothing there, or the hub cannot be reached and its cache does not hold the weights.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        for name in _IN_FOLDERS:
            if (path / name).is_file():
                return path / name
        if (path / "config.json").is_file() and (path.parent / "weights.safetensors").is_file():
            return path.parent / "weights.safetensors"
        raise InputError(f"{field}: the folder {path} holds neither {' nor '.join(_IN_FOLDERS)}")
    if path.is_file():
        return path
    if source.startswith(("/", ".", "~")) or path.suffix in _SUFFIXES or is_darknet(path):
        raise InputError(f"{field}: there is no file or folder {path}")
    return _fetch(source, field)


def _fetch(repository: str, field: str) -> Path:
    """The file in the hub's local cache, without a network; else from the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for cached in (True, False):
        for name in _IN_FOLDERS:
            try:
                return Path(hf_hub_download(repository, name, local_files_only=cached))
            except EntryNotFoundError as error:
                if not cached and isinstance(
                    error, LocalEntryNotFoundError
                ):  # neither reached nor in the cache
                    raise _unreachable(repository, field, error) from error
            except (OSError, ValueError) as error:
                raise _unreachable(repository, field, error) from error
    raise InputError(f"{field}: the hub's {repository!r} holds neither {' nor '.join(_IN_FOLDERS)}")


def _unreachable(repository: str, field: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    folder = repository.rsplit("/", 1)[-1]
    return InputError(
        f"{field}: {repository!r} is no file or folder here, and could not be fetched from the Hugging Face hub "
        f"({type(error).__name__}: {reason}).\n"
        f"On a machine with a network run `hf download {repository} --local-dir {folder}`, "
        f"copy that folder here and set {field} to its path."
    )


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        held = (
            f"only {', '.join(map(str, list(content)[:6]))}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise InputError(
            f"{path}: there are no tensors by name in this file, {held}; expected a state dict, "
            f"or one below {', '.join(map(repr, _WRAPPERS))}"
        )
    return tensors


def _plain(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    # always a copy: safetensors refuses tensors that share memory, as tied weights do
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
