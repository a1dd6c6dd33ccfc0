"""Model references: where a model's files are.

A Hub id (`ORG/NAME`, `ORG/NAME@REVISION`), a local folder, a GGUF file (`path/to/x.gguf`, on the Hub
`ORG/NAME:x.gguf` or `ORG/NAME@REVISION:x.gguf`), or `package:NAME`: the model or GGUF file in an installed package.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import InputError
from common.gguf import dequantise, gguf_sha256, is_gguf, quantisation
from common.steps import files_of, fingerprint

HUB_TIMEOUT = 120  # seconds without a byte, after which a connection counts as lost
_SETTINGS = (".json", ".txt", ".model", ".jinja")  # all that loaders read of a model but its weights


@dataclass(frozen=True)
class ModelReference:
    """Where a model's files are: `name_or_path` and `revision` are what transformers' loaders take."""

    reference: str  # as the recipe wrote it: what cards and manifests show
    source: str  # a Hub id, a folder, or a GGUF file
    revision: str | None = None
    gguf: str | None = None  # the file's name, of a GGUF on the Hub; "" of a local one

    @property
    def name_or_path(self) -> str:
        """A Hub id or a folder; of a GGUF file the folder it is dequantised into, now if it was not before."""
        return self.source if self.gguf is None else str(dequantise(self._gguf_file()))

    @property
    def is_local(self) -> bool:
        """Whether loaders get a folder."""
        return self.gguf is not None or Path(self.source).is_dir()

    def fingerprint(self) -> str:
        """Changes when the weights, the adapter, the tokenizer or the configuration change.

        Local folders are hashed file by file: a name alone would serve stale vectors after a training run. A GGUF
        file is hashed as it is. Hub ids are resolved to the commit the revision points to now.
        """
        if self.gguf is not None:
            return gguf_sha256(self._gguf_file())[:16]
        if self.is_local:
            return fingerprint(files_of(Path(self.source)))
        return f"{self.source}@{hub_commit(self.source, self.revision)}"  # cards tell it

    def quantisation(self) -> dict[str, Any] | None:
        """Of a GGUF model its file, SHA-256, type (such as Q4_1) and mean bits per weight, for cards; else None."""
        return None if self.gguf is None else quantisation(self._gguf_file())

    def _gguf_file(self) -> Path:
        return _hub_file(self.source, self.revision, self.gguf) if self.gguf else Path(self.source)


def resolve_model(reference: str) -> ModelReference:
    """Find the model behind a reference. Raises InputError when a package, a folder or a file does not exist."""
    if not isinstance(reference, str) or not reference.strip():
        raise InputError(f"model reference {reference!r}: name a Hub id, a folder, a GGUF file or package:NAME")
    is_package = reference.startswith("package:")
    path = _in_package(reference.removeprefix("package:")) if is_package else expand_user(reference)
    if path.is_dir():
        return ModelReference(reference, str(path))
    if path.is_file():
        if not is_gguf(path):
            raise InputError(f"model {reference!r}: not a GGUF file; name a folder, a GGUF file or a Hub id")
        return ModelReference(reference, str(path), gguf="")
    repository, _, file = reference.partition(":")
    name, _, revision = repository.partition("@")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf") or file.startswith("//"):
        raise InputError(
            f"model {reference!r}: no such folder or file, and no Hub id (those look like org/name or name)"
        )
    if file and not file.endswith(".gguf"):
        raise InputError(f"model {reference!r}: {file!r} is no GGUF file; name ORG/NAME:FILE.gguf or ORG/NAME")
    return ModelReference(reference, name, revision or None, file or None)


def unlike_hub(reference: str) -> str:
    """`reference`, of a folder or file here with ./ before it: elsewhere, models/base would read as a Hub id.

    >>> unlike_hub("common"), unlike_hub("org/name"), unlike_hub("../x")
    ('./common', 'org/name', '../x')
    """
    is_bare = not reference.startswith((".", "/", "~"))
    return f"./{reference}" if is_bare and os.path.exists(reference) else reference


def expand_user(path: str) -> Path:
    """`path` with ~ expanded; unchanged for an unknown user, where pathlib raises RuntimeError."""
    return Path(os.path.expanduser(path))


def check_model_folder(folder: Path) -> None:
    """Raises InputError for a folder that cannot be loaded: better now than after an hour of BM25.

    Checks what needs no loading: JSON that does not parse, truncated weights, modules that are missing or not
    sentence-transformers' own.
    """
    from safetensors import SafetensorError, safe_open

    if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        raise InputError(f"{folder}: no model in this folder (no modules.json, no config.json); name another")
    for path in sorted(folder.rglob("*.json")):
        try:
            problem = _problem_of(path, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            problem = f"not readable as JSON: {error}"
        if problem:
            raise InputError(f"{path}: {problem}; fetch or save the model again")
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "np"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not readable as safetensors: {error}; fetch or save the model again") from None


def _problem_of(path: Path, content: Any) -> str | None:
    """What is wrong with a JSON file of a model folder, if anything is."""
    if path.name == "modules.json":
        for module in content if isinstance(content, list) and content else [None]:
            if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
                return "not a list of modules, each with a type and a path"
            if not module["type"].startswith("sentence_transformers."):
                return f"module {module['type']} is not one of sentence-transformers' own"
            inside = os.path.normpath(module["path"])
            # Normalize keeps no file, so packages and git lose its folder, and loaders do not ask for it
            there = (path.parent / inside).is_dir() or module["type"].endswith(".Normalize")
            if inside.startswith(("..", "/")) or not there:
                return f"module {module['type']} has no folder {module['path']!r} here"
    elif path.name in ("config.json", "config_sentence_transformers.json", "tokenizer.json"):
        if not isinstance(content, dict):
            return "not a mapping"
        if path.name == "tokenizer.json" and "model" not in content:
            return "no tokenizer's: it has no model"
        prompts = content.get("prompts") if path.name == "config_sentence_transformers.json" else None
        wrong = [name for name, prompt in (prompts or {}).items() if not isinstance(prompt, str | None)]
        if wrong:
            return f"prompt {wrong[0]!r} is {prompts[wrong[0]]!r}, which is no text"
    return None


def positions_in(config: Any) -> int | None:
    """The longest text that a model of this configuration has positions for; None where it names no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    # RoBERTa's relatives count positions from behind the padding token's id
    is_offset = any(name in config.model_type for name in ("roberta", "camembert", "mpnet", "xmod", "longformer"))
    return positions - (config.pad_token_id + 1) if is_offset else positions


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """transformers shows a bar for each file of weights that it reads or writes, also for a single small one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def datasets_cache(content: str) -> str:
    """Where `load_dataset` may unpack a folder whose files have the fingerprint `content`.

    datasets (5.2) knows a folder in its cache by its name and README alone: it would go on serving the rows of another
    folder of that name, or those from before the folder was made anew.
    """
    from datasets.config import HF_DATASETS_CACHE

    return str(Path(HF_DATASETS_CACHE) / content)


@functools.cache
def limit_waiting() -> None:
    """Give requests of huggingface_hub that have no timeout one of HUB_TIMEOUT.

    Setting it on the client is not enough: the library's calls pass timeout=None, which overrides it. Calls that have
    a timeout keep it.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        limits = request.extensions["timeout"]
        request.extensions["timeout"] = {kind: limits[kind] or HUB_TIMEOUT for kind in limits}

    def make_client() -> Any:  # called again after a connection that failed
        client = default_client_factory()
        client.event_hooks["request"].append(limit)
        return client

    set_client_factory(make_client)


def hub_commit(repo_id: str, revision: str | None, repo_type: str = "model") -> str:
    """The commit a Hub revision points to now; offline, what it pointed to when a model was brought into the cache.

    A data set's is not asked of the cache: `datasets` loads from one of its own, which may hold another commit.

    Raises InputError in one line when neither can say.
    """
    limit_waiting()  # every command that reads from the Hub comes here first
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return revision  # a commit never changes: nothing to ask
    from huggingface_hub import HfApi, is_offline_mode

    with _served(
        f"{repo_type} {repo_id!r}: not a local folder, and the Hub did not serve it",
        "; check the name, the network and HF_TOKEN, then run again",
    ):
        if repo_type == "model" and is_offline_mode():
            return HfApi().resolve_revision(repo_id, revision=revision, local_files_only=True).resolved
        return HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type).sha


@contextlib.contextmanager
def _served(what: str, advice: str = "") -> Iterator[None]:
    """Raises InputError, `what`, the reason and `advice` in a line, where the Hub does not serve what is asked."""
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RevisionResolutionError

    try:
        yield
    except UnicodeEncodeError:  # of the request's headers
        raise InputError("HF_TOKEN holds a character that no token has; set it again") from None
    # also no network, or no such host, or offline nothing in the cache
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, RevisionResolutionError, OSError) as error:
        raise InputError(f"{what}: {str(error).strip().splitlines()[0]}{advice}") from None


def fetch_settings(model: ModelReference) -> str | None:
    """Download a Hub model's settings and return their commit, to load it by; None for a folder.

    Loaders treat a settings file that failed to download as missing: a Hub that fails at modules.json or at the
    prompts' file would silently give a model that pools in another way, or has no prompts.

    Raises InputError in one line when the Hub does not serve them.
    """
    if model.is_local:
        return None
    from huggingface_hub import HfApi, hf_hub_download, is_offline_mode

    commit = hub_commit(model.name_or_path, model.revision)
    if is_offline_mode():
        return commit  # a cache that has the weights has the settings, which are fetched before them
    with _served(f"model {model.reference!r}: the Hub did not serve all of it", "; run again"):
        for name in HfApi().list_repo_files(model.name_or_path, revision=commit):
            if name.endswith(_SETTINGS):
                hf_hub_download(model.name_or_path, name, revision=commit)
    return commit


@functools.cache
def _hub_file(repo_id: str, revision: str | None, name: str) -> Path:
    """A file of a Hub repository, brought into the cache. Raises InputError when the Hub does not serve it."""
    from huggingface_hub import hf_hub_download

    commit = hub_commit(repo_id, revision)
    with _served(f"model '{repo_id}:{name}': the Hub did not serve this file"):
        return Path(hf_hub_download(repo_id, name, revision=commit))


def _in_package(name: str) -> Path:
    """The folder or the GGUF file inside an installed package that holds a model (found, not imported)."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"model 'package:{name}': no installed package of that name; pip install it first")
    for root in spec.submodule_search_locations:
        for folder, subfolders, files in os.walk(root):
            subfolders.sort()
            if "modules.json" in files or {"config.json", "model.safetensors"} <= set(files):
                return Path(folder)
            for file in sorted(files):
                if file.endswith(".gguf"):
                    return Path(folder, file)
    raise InputError(f"model 'package:{name}': the package holds no model (modules.json, model.safetensors or GGUF)")
