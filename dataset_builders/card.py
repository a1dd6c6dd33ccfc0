"""Recipe and manifests -> README.md of the published folder: how the data were made, checked, and can be made again.

It is also what `load_dataset` and the Hub's viewer read: the YAML on top names the files of each configuration, their
columns and their sizes. A build does not know the repository it will be published in; `card_for` puts its name in.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.steps import BUILD_FOLDERS, GENERATED
from dataset_builders.bm25 import describe_words
from dataset_builders.decontamination import zero_shot
from dataset_builders.sources import registry

if TYPE_CHECKING:
    from datasets import DatasetInfo
    from huggingface_hub import DatasetCardData

CARD = Path(__file__).with_name("dataset_card.md")
REPO_ID = "ORG/NAME"  # stands in the card of a build for the repository's name
STEPS = (GENERATED, *BUILD_FOLDERS[:-1])
BENCHMARK = "MTEB(eng, v2)"  # that zero-shot is stated for, unless the recipe names another
# The Hub's identifiers (huggingface.co/docs/hub/repositories-licenses), those for model weights left out; it refuses a
# card with any other.
LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl
lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 osl-3.0 pddl postgresql unlicense
wtfpl zlib unknown
"""
# The Hub's task categories. Every row says which texts are alike; a retrieval set can be searched, too.
TASK_CATEGORIES = {"retrieval": ["text-retrieval", "sentence-similarity"]}
# Texts of one class are positives of each other, so one row's document is no negative of another's query.
CLASS_TASKS = ("classification", "clustering")
SIZES = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M", 1e8: "10M<n<100M"}


@dataclass(frozen=True)
class Config:
    """A table that was written: `path` is the pattern that its files match, and no others."""

    name: str
    path: str
    info: DatasetInfo  # features, rows and bytes of the one split, `train`

    @property
    def rows(self) -> int:
        return self.info.splits["train"].num_examples


def render_card(configs: Sequence[Config], facts: Mapping[str, Any]) -> str:
    """README.md. `facts`: the recipe's keys, and the manifest of each of STEPS; a step that was not made is left out.

    The first of `configs` is the default one.
    """
    made = {step: facts.get(step) for step in STEPS}
    recipe = {key: value for key, value in facts.items() if key not in STEPS}
    if made["sts"] and "sts" in made["sts"]["inputs"]:  # the manifest stands where the recipe's section was
        recipe["sts"] = made["sts"]["inputs"]["sts"]
    # what decided the source's rows: its commit on the Hub, the files of a folder, or packages and their versions
    read = {"commit": None, "files": None, "packages": None} | (made["corpus"] or made["sts"])["inputs"]["source"]
    public = public_recipe(recipe, read["commit"], used_models(made))
    entry = registry()[recipe["source"]["name"]] if recipe["source"]["kind"] == "registry" else None
    licence = entry.licence if entry else source_licence(recipe["source"])
    trained_on = recipe["source"].get("training_datasets")
    benchmark = (recipe.get("decontamination") or {}).get("benchmark") or BENCHMARK
    dataset = entry.dataset if entry else public["source"].get("dataset")
    metadata = card_metadata(configs, public, licence, dataset if read["commit"] else None)
    environment = Environment(
        loader=FileSystemLoader(CARD.parent), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= FILTERS
    return environment.get_template(CARD.name).render(
        metadata=metadata.to_yaml(),
        repo_id=REPO_ID,
        configs=configs,
        recipe=public,
        packages=sorted({*re.findall(r"\bpackage:(\w+)", json.dumps(public))}),
        recipe_yaml=yaml.safe_dump(public, sort_keys=False, allow_unicode=True, width=110).strip(),
        words=describe_words(public["source"].get("language")),
        margin=describe_margin(public["mining"]) if made["mined"] else None,
        title=source_title(public["source"]),
        entry=entry,
        licence=licence,
        read=read,
        in_batch_negatives=entry.in_batch_negatives if entry else public["task_type"] not in CLASS_TASKS,
        compared=compared_tasks(made["corpus"]),
        zero_shot=zero_shot(trained_on, benchmark) if trained_on is not None else None,
        **made,
    )


def card_for(folder: Path, repo_id: str) -> str:
    """The card in `folder` as it is published under `repo_id`: every line that a reader runs names the repository."""
    return (folder / "README.md").read_text(encoding="utf-8").replace(REPO_ID, repo_id)


def card_metadata(
    configs: Sequence[Config], recipe: Mapping[str, Any], licence: str | None, source_dataset: str | None
) -> DatasetCardData:
    """What the Hub searches by, what `load_dataset` finds files by, and what the viewer shows without reading them.

    `source_dataset`: the Hub's data set that the texts come from, if they come from one.
    """
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    files = [
        {"config_name": config.name, "data_files": [{"split": "train", "path": config.path}]} for config in configs
    ]
    task_type = recipe["task_type"]
    graded = [] if task_type == "sts" else ["hard-negatives", "distillation"]  # published pairs keep their own scores
    metadata = DatasetCardData(
        pretty_name=f"{source_title(recipe['source'])}, graded",
        language=[recipe["source"]["language"]] if "language" in recipe["source"] else None,
        **license_fields(licence),
        # the labels are a teacher's, on pairs whose relevance others judged
        annotations_creators=["machine-generated", "found"] if graded else ["found"],
        language_creators=["found", "machine-generated"] if recipe["source"].get("queries") else ["found"],
        multilinguality=["monolingual"] if "language" in recipe["source"] else None,
        source_datasets=[source_dataset] if source_dataset else None,
        task_categories=TASK_CATEGORIES.get(task_type, ["sentence-similarity"]),
        size_categories=[next((name for limit, name in SIZES.items() if configs[0].rows < limit), "n>100M")],
        tags=["sentence-transformers", "graded-embedder", *graded, task_type],
        configs=[{**files[0], "default": True}, *files[1:]],
    )
    DatasetInfosDict({config.name: config.info for config in configs}).to_dataset_card_data(metadata)
    return metadata


def license_fields(licence: str | None) -> dict[str, str]:
    """As the Hub writes licences: one of its identifiers, `other` with a name or an address, or `unknown`.

    >>> license_fields("CC-BY-SA-4.0"), license_fields(None)
    ({'license': 'cc-by-sa-4.0'}, {'license': 'unknown'})
    >>> license_fields("https://example.org/terms")
    {'license': 'other', 'license_name': 'terms-of-the-source', 'license_link': 'https://example.org/terms'}
    >>> license_fields("Educational use only")
    {'license': 'other', 'license_name': 'educational-use-only'}
    """
    if licence is None or licence == "not specified":
        return {"license": "unknown"}
    if licence.startswith(("http://", "https://")):
        return {"license": "other", "license_name": "terms-of-the-source", "license_link": licence}
    name = "-".join(re.findall(r"[a-z0-9.]+", licence.lower()))
    return {"license": name} if name in LICENSES.split() else {"license": "other", "license_name": name}


def public_recipe(recipe: Mapping[str, Any], commit: str | None, models: Mapping[str, str]) -> dict[str, Any]:
    """The recipe as a stranger can use it: keys at null left out, source and models pinned, local paths by name."""
    cleaned = _without_paths(recipe)
    if commit and "revision" in recipe["source"]:
        cleaned["source"]["revision"] = commit
    for section, model in models.items():
        name, _, number = section.partition(" ")
        target = cleaned["source"]["queries"] if name == "queries" else cleaned[name]
        (target["teachers"][int(number)] if number else target)["model"] = model
    return cleaned


def _without_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        # `local` maps task names to folders
        inner = {name: _without_paths(item, "path" if key == "local" else name) for name, item in value.items()}
        return {name: item for name, item in inner.items() if item not in (None, [], {})}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if key == "path" and isinstance(value, str):
        return Path(value).name
    if key in ("model", "dataset") and isinstance(value, str):
        return public_name(value)
    return value


def public_name(reference: str) -> str:
    """A Hub id or package as it is; of a folder or file on this machine its last part; of a server no address.

    >>> public_name("org/model@main"), public_name("/home/me/models/mine"), public_name("package:name")
    ('org/model@main', 'mine', 'package:name')
    >>> public_name("teacher/without-{fold}")
    'without-{fold}'
    >>> public_name("http://10.0.0.7:8000/v1")
    'a server of chat completions'
    """
    if reference.startswith(("http://", "https://")):
        return "a server of chat completions"
    is_path = reference.startswith((".", "/", "~")) or os.path.exists(reference) or reference.count("/") > 1
    is_path |= "{" in reference  # folders of a cross-fitted teacher
    return Path(reference).name if is_path else reference


def describe_margin(mining: Mapping[str, Any]) -> str:
    """Which candidates a recipe's `mining` takes for negatives, in words.

    >>> describe_margin({"margin": 0.1, "margin_type": "absolute"})
    "only documents with label < the positive's label - 0.1"
    """
    margin = mining["margin"]
    if mining["margin_type"] == "ratio":
        return f"only documents with label < {margin} × the positive's label (those above may be relevant)"
    if mining["margin_type"] == "absolute":
        return f"only documents with label < the positive's label - {margin}"
    if mining["margin_type"] == "none":
        return "whatever their label"
    return (
        f"**only documents with label ≥ {margin} × the positive's label: a control, the inequality turned round; do "
        "not train on it for use**"
    )


def used_models(made: Mapping[str, Any]) -> dict[str, str]:
    """Section of the recipe ("teacher 0": the first of a hybrid) -> ORG/NAME@COMMIT, of models from the Hub."""
    sections = {"queries": made[GENERATED]["inputs"]["queries"]} if made.get(GENERATED) else {}
    if made["candidates"]:
        sections["dense"] = made["candidates"]["inputs"]["dense"]
    if made["scores"]:
        teacher = made["scores"]["inputs"]["teacher"]
        named = {f"teacher {number}": section for number, section in enumerate(teacher.get("teachers", ()))}
        sections |= {"teacher": teacher} if "model" in teacher else named
    models = {name: section["model"] for name, section in sections.items()}
    return {section: model for section, model in models.items() if "@" in model}


def source_title(source: Mapping[str, Any]) -> str:
    """What the source is called, by whichever key its kind has."""
    return next((source[key] for key in ("name", "path", "dataset") if key in source), "Python documentation")


def source_licence(source: Mapping[str, Any]) -> str | None:
    """What the recipe states; None where it states nothing."""
    return "that of each documented package" if source["kind"] == "pydocs" else source.get("licence")


def compared_tasks(corpus: Mapping[str, Any] | None) -> list[str]:
    """Names of the evaluation tasks that a corpus was compared with."""
    compared = (corpus or {"inputs": {}})["inputs"].get("decontamination") or {"tasks": (), "local": ()}
    return sorted({*compared["tasks"], *compared["local"]})


FILTERS = {
    "count": "{:,}".format,
    "percent": lambda share: "-" if share is None else f"{100 * share:.1f} %",
    "quoted": repr,
    "figure": lambda value: "-" if value is None else f"{value:.4f}",
    "megabytes": lambda size: f"{size / 1e6:,.1f} MB" if size >= 5e4 else "< 0.1 MB",
}
