"""Loading denoisers from a folder on disk: safetensors only, classes from a list, nothing executed, nothing fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from balanced_rep.models._checks import check_device
from balanced_rep.models._diffusers import DiffusersDenoiser, from_diffusers

__all__ = ["UnsafeModelError", "encode_prompts", "load"]

NETWORKS = (
    "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel",
)  # fmt: skip
AUTOENCODERS = ("AutoencoderKL",)
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip
TEXT_ENCODERS = ("CLIPTextModel",)
SUFFIXES = ("*.json", "*.txt", "*.safetensors")


class UnsafeModelError(ValueError):
    """A model folder that would have to be trusted to be loaded; the message says what is in it."""


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    scheduler: str | Path | None = None,
    null_condition: Any = None,
    with_vae: bool = True,
) -> DiffusersDenoiser:
    """Loads a diffusers pipeline or network from a local folder as a denoiser.

    Weights are read from safetensors files, and only classes of diffusers and transformers that this package knows are
    made; no code of the folder runs, and nothing is fetched. A Stable Diffusion folder gets the embedding of the empty
    prompt as its null condition if it holds the text encoder and the tokenizer.

    Args:
        folder: Of a pipeline (`model_index.json`) or of one network (`config.json`).
        dtype: Of the weights; default: as stored.
        device: Where to; default: the CPU.
        scheduler: Folder of the scheduler, for a network without one.
        null_condition: See `from_diffusers`.
        with_vae: Load the autoencoder, too, if there is one.

    Returns:
        The denoiser.

    Raises:
        FileNotFoundError: If there is no such folder; says how to get it, if it looks like a model id.
        ValueError: If the folder holds no model that can be loaded, weights are missing, or there is no such device.
        UnsafeModelError: If its weights are pickled, or it asks for a class that is not on the list.
    """
    root = _folder(folder)
    check_device("load", device or "cpu")
    _refuse_code(root)
    index = _read_json(root / "model_index.json") if (root / "model_index.json").is_file() else None
    if index is None:
        net = _network(root, None, NETWORKS, dtype)
        schedule = _scheduler(Path(scheduler) if scheduler else root / "scheduler")
        return from_diffusers(net, schedule, null_condition=null_condition).to(device or "cpu")
    part = next((name for name in ("unet", "transformer") if _listed(index, name)), None)
    if part is None:
        raise ValueError(f"{root}: model_index.json lists neither a unet nor a transformer.")
    net = _network(root, part, NETWORKS, dtype)
    vae = _network(root, "vae", AUTOENCODERS, dtype) if with_vae and _listed(index, "vae") else None
    schedule = _scheduler(Path(scheduler) if scheduler else root / "scheduler")
    if null_condition is None and part == "unet" and _listed(index, "text_encoder") and _listed(index, "tokenizer"):
        null_condition = encode_prompts(root, [""], dtype=dtype)
    return from_diffusers(net, schedule, vae=vae, null_condition=null_condition).to(device or "cpu")


@torch.no_grad()
def encode_prompts(folder: str | Path, prompts: list[str], *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Embeddings of prompts by the CLIP text encoder of a Stable Diffusion folder.

    Args:
        folder: Of the pipeline.
        prompts: The prompts.
        dtype: Of the weights.

    Returns:
        `(prompts, tokens, features)`.

    Raises:
        ValueError: If there are no prompts, or the folder has no CLIP text encoder with a tokenizer.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"encode_prompts: prompts must be a list of texts, at least one, got {prompts!r}.")
    root = _folder(folder)
    if not (root / "tokenizer").is_dir() or not (root / "text_encoder").is_dir():
        raise ValueError(f"{root}: no text_encoder and tokenizer in it; give prompt embeddings as cond= instead.")
    config = _read_json(root / "text_encoder" / "config.json")
    kinds = config.get("architectures")
    if not isinstance(kinds, list) or not kinds or any(kind not in TEXT_ENCODERS for kind in kinds):
        raise ValueError(f"{root}: the text encoder is {kinds!r}; known is {TEXT_ENCODERS[0]}.")
    _check_weights(root / "text_encoder")
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    if dtype is not None:
        options["dtype"] = dtype
    tokenizer = CLIPTokenizer.from_pretrained(str(root / "tokenizer"), local_files_only=True, trust_remote_code=False)
    encoder = _complete(root / "text_encoder", CLIPTextModel, options)
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return encoder.eval()(tokens.input_ids).last_hidden_state


def _folder(folder: str | Path) -> Path:
    root = Path(folder)
    if root.is_dir():
        return root
    name = str(folder)
    if name.count("/") == 1 and not root.is_absolute() and not name.startswith("."):
        patterns = " ".join(f'--include "{s}"' for s in SUFFIXES)
        raise FileNotFoundError(
            f"There is no folder {name!r}, and models are not fetched. To get it:\n"
            f"    hf download {name} {patterns} --local-dir {name.split('/')[1]}\n"
            f"then load({name.split('/')[1]!r})."
        )
    raise FileNotFoundError(
        f"There is no folder {name!r}. Give the folder of a pipeline or network saved by diffusers."
    )


def _refuse_code(root: Path) -> None:
    scripts = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    if scripts:
        raise UnsafeModelError(
            f"{root} holds code ({', '.join(scripts[:3])}): nothing of a model folder is executed here. If the weights "
            "and configuration files are all that is needed, remove the code."
        )


def _listed(index: dict[str, Any], part: str) -> bool:
    entry = index.get(part)
    return isinstance(entry, list) and len(entry) == 2 and None not in entry


def _network(root: Path, part: str | None, known: tuple[str, ...], dtype: torch.dtype | None) -> Any:
    folder = root if part is None else root / part
    name = _class_name(folder / "config.json", known)
    _check_weights(folder)
    import diffusers

    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
    if dtype is not None:
        options["torch_dtype"] = dtype
    net = _complete(folder, getattr(diffusers, name), options)
    return net if dtype is None else net.to(dtype)  # some classes are left in float32


def _complete(folder: Path, kind: Any, options: dict[str, Any]) -> Any:
    """Reads weights. Libraries only log that some are missing, and leave these as they were drawn."""
    try:
        net, found = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except (OSError, RuntimeError) as error:  # truncated files, weights of another shape
        said = " ".join(line.strip() for line in str(error).splitlines() if "ignore_mismatched_sizes" not in line)
        raise ValueError(f"{folder}: its weights cannot be read as a {kind.__name__}: {said}") from error
    lost = sorted({str(key) for key in found["missing_keys"]} | {str(each[0]) for each in found["mismatched_keys"]})
    if lost:
        raise ValueError(
            f"{folder}: {len(lost)} weights of a {kind.__name__} with its config.json are not in its files or have "
            f"another shape, such as {', '.join(lost[:3])}; fetch the whole model."
        )
    return net


def _scheduler(folder: Path) -> Any:
    if not (folder / "scheduler_config.json").is_file():
        raise ValueError(
            f"{folder}: no scheduler_config.json; give scheduler= with the folder of the scheduler that the network "
            "was trained with."
        )
    name = _class_name(folder / "scheduler_config.json", SCHEDULERS)
    import diffusers

    return getattr(diffusers, name).from_config(_read_json(folder / "scheduler_config.json"))


def _class_name(path: Path, known: tuple[str, ...]) -> str:
    name = _read_json(path).get("_class_name")
    if name not in known:
        raise UnsafeModelError(f"{path}: its class is {name!r}; loaded are only {', '.join(known)}.")
    return name


def _check_weights(folder: Path) -> None:
    """Refuses what is no plain set of safetensors files in the folder itself."""
    adapters = [
        p.name for p in (folder / "adapter_config.json", folder / "pytorch_lora_weights.safetensors") if p.exists()
    ]
    if adapters:
        raise ValueError(
            f"{folder}: {adapters[0]} says that this is an adapter (LoRA), a change of another model. Merge the two "
            "where it was made (diffusers: fuse_lora, peft: merge_and_unload), save the result, and load that."
        )
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = _read_json(index).get("weight_map")
        names = set(map(str, shards.values())) if isinstance(shards, dict) else {"?"}
        for name in sorted(names):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UnsafeModelError(f"{index}: it names {name!r}, which is no safetensors file of its folder.")
            if not (folder / name).is_file():
                raise ValueError(f"{index}: its file {name} is not there; fetch the whole model.")
    if next(folder.glob("*.safetensors"), None) is None:
        pickled = sorted(p.name for s in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(s))
        if pickled:
            raise UnsafeModelError(
                f"{folder}: weights are pickled ({', '.join(pickled[:3])}), and unpickling executes code. Get the "
                "safetensors files of the model, or convert it where it is trusted."
            )
        raise ValueError(f"{folder}: no weights in it (*.safetensors).")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent}: no {path.name}; this is not a folder saved by diffusers.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON object is needed, got {type(found).__name__}.")
    return found
