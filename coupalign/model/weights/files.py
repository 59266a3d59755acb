"""Find files of weights and read them: local files, folders, and the Hugging Face hub.

Formats are .safetensors, PyTorch's .pth, .pt and .bin, and Darknet's.
"""

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
# The files of a model in a folder or on the hub, the better one first.
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
# Keys under which training scripts wrap a state dict.
_WRAPPERS = ("model", "state_dict", "module")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file to the CPU, written by `write_weights` or anything else.

    Raises:
        InputError: the file does not exist, or is incomplete.
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
    """Write tensors as safetensors, atomically.

    They are written contiguous and from the CPU, floating point as fp32. The same tensors give the
    same bytes.
    """
    copies = {name: _copy_for_file(tensor) for name, tensor in state.items()}
    with whole_file(Path(path)) as file:
        file.write(safetensors.torch.save(copies, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a local weights file by name, in any of the formats.

    A state dict that is wrapped in {"model": ...} or {"state_dict": ...} is unwrapped. Pickled
    files are read by torch's restricted unpickler, which runs no code from the file.

    Raises:
        InputError: the file cannot be read as weights, or has no tensors.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    if is_darknet(path):
        return read_darknet(path)

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise almost any type
        reason = _first_line(error) or type(error).__name__
        raise InputError(
            f"{path} ({path.stat().st_size} bytes): cannot be read as weights: {reason}\n"
            "If the file is damaged, fetch it again. If it holds objects other than tensors and "
            "you trust it: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)"
        ) from error
    return _unwrap_state_dict(content, path)


def locate(source: str, field: str) -> Path:
    """Find the weights file for a path, a folder, or a hub name.

    Args:
        source: one of
            the path of a file;
            a folder with model.safetensors or pytorch_model.bin;
            the folder text/ of one of our checkpoints, which gives the shape of the weights in
            weights.safetensors next to it;
            a Hugging Face hub name.
        field: the config field that `source` is from, for messages.

    Raises:
        InputError: nothing is there, or the hub cannot be reached and its cache does not have the
            weights.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        # A published model, or the text/ of one of our checkpoints.
        for name in _MODEL_FILES:
            if (path / name).is_file():
                return path / name
        checkpoint = path.parent / "weights.safetensors"
        if (path / "config.json").is_file() and checkpoint.is_file():
            return checkpoint
        raise InputError(f"{field}: the folder {path} has neither {' nor '.join(_MODEL_FILES)}")

    if path.is_file():
        return path

    # Do not look up on the hub what was meant as a path.
    looks_like_path = source.startswith(("/", ".", "~"))
    if looks_like_path or path.suffix in _SUFFIXES or is_darknet(path):
        raise InputError(f"{field}: there is no file or folder {path}")
    return _download(source, field)


def _download(repository: str, field: str) -> Path:
    """Return the file from the hub's local cache, without a network, or else from the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for cached in (True, False):
        for name in _MODEL_FILES:
            try:
                return Path(hf_hub_download(repository, name, local_files_only=cached))
            except EntryNotFoundError as error:
                # The local kind means: neither reachable nor in the cache.
                if not cached and isinstance(error, LocalEntryNotFoundError):
                    raise _unreachable(repository, field, error) from error
            except (OSError, ValueError) as error:
                raise _unreachable(repository, field, error) from error

    files = " nor ".join(_MODEL_FILES)
    raise InputError(f"{field}: {repository!r} on the hub has neither {files}")


def _unreachable(repository: str, field: str, error: Exception) -> InputError:
    folder = repository.rsplit("/", 1)[-1]
    return InputError(
        f"{field}: {repository!r} is not a file or folder here, and could not be fetched from the "
        f"Hugging Face hub ({type(error).__name__}: {_first_line(error)}).\n"
        f"On a machine with a network run `hf download {repository} --local-dir {folder}`, "
        f"copy that folder here and set {field} to its path."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0]:.200}" if lines else ""


def _unwrap_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the tensors in a loaded file, below any wrappers."""
    # Descend to the innermost wrapper.
    while isinstance(content, Mapping):
        wrapped = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not wrapped:
            break
        content = wrapped[0]

    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
        names = [f"{name!s:.40}" for name in list(content)[:6]]
        found = f"only {', '.join(names)}"
    else:
        found = f"a {type(content).__name__}"
    raise InputError(
        f"{path}: the file has no tensors by name, {found}. "
        f"Expected a state dict, or one below {', '.join(map(repr, _WRAPPERS))}"
    )


def _copy_for_file(tensor: Tensor) -> Tensor:
    # Always copy: safetensors refuses tensors that share memory, as tied weights do.
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
