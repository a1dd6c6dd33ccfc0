import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from benchmarks import bench_scale
from benchmarks.synthetic import write_set
from common.recipes import parse_recipe
from common.steps import read_parquet
from dataset_builders.build import parse_arguments
from dataset_builders.engines import Ray
from dataset_builders.sources import LocalSource, read_rows

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "ray"
INSTALLED = "/opt/graded-embedder"  # where the image has the repository


def build_commands(text: str) -> list[list[str]]:
    """The arguments of each dataset_builders.build command in a file, whether in a comment, a key or a paragraph."""
    joined = re.sub(r"\\\n\s*#?", " ", text)
    found = re.findall(r"python -m dataset_builders\.build ([^\"`]*?--ray\.[^\"`\n]*(?:\n +--[^\"`\n]*)*)", joined)
    return [shlex.split(command) for command in found if "..." not in command]


def checked(command: list[str]) -> Ray:
    """The `ray` section of a command whose flags exist, whose recipe ships and whose output is on the volume."""
    options, flags = parse_arguments(command)
    assert options.engine == "ray" and str(options.output_dir).startswith("/shared/")
    assert (ROOT / Path(options.config).relative_to(INSTALLED)).is_file()
    names = flags[::2]
    assert names and all(name.startswith("--ray.") for name in names)
    return parse_recipe(Ray, {}, "command", [flag.replace("--ray.", "--") for flag in flags])


def test_the_kubernetes_job_has_the_gpus_that_its_command_asks_for():
    """And one image, volume and path for head and workers, with the pinned Ray: what the engine relies on."""
    job = yaml.safe_load((RECIPES / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    entrypoint = job["spec"]["entrypoint"]
    assert entrypoint.startswith("python -m dataset_builders.build ")
    ray = checked(shlex.split(entrypoint)[3:])
    cluster = job["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    assert ray.address == "auto" and ray.workers == workers["replicas"] * ray.gpus_per_worker
    pods = [cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    head, worker = (container for pod in pods for container in pod["containers"])
    limits = worker["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == ray.gpus_per_worker and limits["cpu"] >= ray.cpus_per_worker
    assert all(head[key] == worker[key] for key in ("image", "volumeMounts", "env"))
    assert pods[0]["volumes"] == pods[1]["volumes"] and worker["volumeMounts"][0]["mountPath"] == "/shared"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    [pinned] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert f"FROM rayproject/ray:{pinned}-" in (RECIPES / "Dockerfile").read_text()
    assert cluster["rayVersion"] == pinned


def test_the_cloud_cluster_has_the_gpus_that_its_command_asks_for():
    """And the page on many machines says the same."""
    text = (RECIPES / "ray-up.yaml").read_text()
    cluster = yaml.safe_load(text)
    [command] = build_commands(text)
    workers = cluster["available_node_types"]["gpu"]
    assert checked(command).workers == workers["min_workers"] == workers["max_workers"] == cluster["max_workers"]
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert "--volume=/shared:/shared" in cluster["docker"]["run_options"]
    page = ROOT / "docs" / "many-machines.md"
    assert build_commands(page.read_text()) == [command]
    assert {*re.findall(r"`ray\.(\w+)`", page.read_text())} == {*Ray.model_fields}
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert len(links) >= 3 and all((page.parent / link).exists() for link in links)


def test_the_cloud_cluster_fits_rays_own_schema():
    autoscaler = pytest.importorskip("ray.autoscaler", reason="Ray is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert {"available_node_types", "head_node_type"} <= schema["properties"].keys()
    jsonschema.validate(yaml.safe_load((RECIPES / "ray-up.yaml").read_text()), schema)


def test_the_synthetic_set_is_built_with_its_duplicates_found(tmp_path):
    bench_scale.prepare(tmp_path, documents=1000, queries=50)
    rows = read_rows(LocalSource(kind="local", path=str(tmp_path / "set"), eval_splits=("test",)), None)
    assert (len(rows.documents), len(rows.queries), len(rows.qrels)) == (1000, 50, 50)
    again = tmp_path / "again"
    write_set(again, 1000, 50)
    for name in ("corpus", "queries", "qrels"):
        assert (again / f"{name}.parquet").read_bytes() == (tmp_path / "set" / f"{name}.parquet").read_bytes()
    found = bench_scale.Measured(1000, 50)
    bench_scale.build(tmp_path, "corpus", found)
    assert list(found.seconds) == ["corpus"] and found.anonymous["corpus"] > 50 and found.processor["corpus"] > 0
    corpus = tmp_path / "this" / "corpus"
    assert len(read_parquet(corpus / "groups.parquet")) == 2  # one document of a thousand, and what nearly repeats it
    assert '"documents": 999' in (corpus / "manifest.json").read_text()


def test_what_uv_reads_of_train_st_is_what_setup_cfg_asks_for():
    """As the standard for inline metadata (PEP 723) finds the block."""
    import configparser
    import tomllib

    block = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    [found] = re.finditer(block, (ROOT / "train_st.py").read_text())
    assert found["type"] == "script"
    inline = tomllib.loads("\n".join(line[2:] for line in found["content"].splitlines()))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split("\n")
    assert inline["dependencies"] == [line for line in required if line] and len(inline["dependencies"]) > 20
    assert inline["requires-python"] == setup["options"]["python_requires"]
