"""docs/serving.md: what it says about our files is so, and its comparison runs, against a server that does as told."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from modeling.encoder import POOLING, build_encoder, save_merged
from modeling.prompts import baked_prompts
from modeling.reference import write_reference

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
PROMPTS = baked_prompts("Given a question, retrieve its answer")
TEXTS = ["how do I parse a date", "", "read " * 100]


@pytest.fixture(scope="module")
def encoder(tiny_decoder):
    return build_encoder(tiny_decoder, max_seq_length=64, prompts=PROMPTS)


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    save_merged(encoder, folder)
    write_reference(encoder, folder)
    return folder


def test_every_pooling_has_its_row():
    told = re.findall(r"^\| `(\w+)` \| yes, tested \|", PAGE, flags=re.MULTILINE)
    assert told == list(POOLING)


def test_our_files_are_what_the_page_says_servers_read(folder):
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode"] == "lasttoken" and "pooling_mode_lasttoken" not in pooling
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 64
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == PROMPTS
    modules = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert [name.rsplit(".")[-1] for name in modules] == ["Transformer", "Pooling", "Normalize"]


def test_sentence_transformers_reads_the_length_back_and_drops_it_from_where_servers_look(folder, encoder, tmp_path):
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 64
    assert model.encode(TEXTS) == pytest.approx(encoder.encode(TEXTS), abs=1e-6)
    model.save(str(tmp_path), create_model_card=False)
    assert "max_seq_length" not in json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert SentenceTransformer(str(tmp_path), device="cpu").max_seq_length == 64


@pytest.mark.parametrize("prompt_name", [None, "query", "STS12"])
def test_the_tokenizer_file_alone_ends_texts_in_eos(folder, encoder, prompt_name):
    """As text-embeddings-inference reads it: no padding, its own truncation, the prompt put before the text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(64)
    prompt = PROMPTS[prompt_name] if prompt_name else ""
    for text in TEXTS:
        ids = tokenizer.encode(prompt + text).ids
        assert ids == encoder.preprocess([text], prompt=prompt or None)["input_ids"][0].tolist()
        assert ids[-1] == encoder.tokenizer.eos_token_id and len(ids) <= 64


@pytest.fixture
def server(encoder):
    """text-embeddings-inference's /embed as the page describes it, with sentence-transformers in its place."""
    asked = []

    class Embed(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            vectors = encoder.encode(body["inputs"], prompt_name=body.get("prompt_name")).tolist()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(vectors).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Embed)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/embed", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_comparison_of_the_page_runs(folder, server, capsys):
    url, asked = server
    [lines] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert lines.count('"runs/demo/model"') == 1 and lines.count('"http://localhost:8080/embed"') == 1
    exec(lines.replace("runs/demo/model", str(folder)).replace("http://localhost:8080/embed", url), {})
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(asked) >= 5
    assert all(line.startswith("1.00000 ") for line in told)
    assert {body.get("prompt_name") for body in asked} == {None, "query"}
