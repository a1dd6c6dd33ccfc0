#!/usr/bin/env bash
# peft 0.21.2: the average of two equal adapters is another adapter, whichever combination_type is taken.
#
# add_weighted_adapter(["a", "b"], [0.5, 0.5]) of adapters with the same weights should be that adapter. A good guess is
# that "cat" and "svd" are exact and "linear", the one without a larger rank or a decomposition, nearly so. "linear" adds
# up the A's and the B's by themselves, each times sqrt(weight), so the product of two equal ones is doubled (n of them: n
# times). "cat" and "svd" are exact for plain LoRA alone: the new adapter keeps use_rslora and gets lora_alpha = rank, so
# that its own scaling is sqrt(rank) where 1 is meant; and of DoRA its magnitudes begin anew. Nothing is said.
# Seen, as the length of the averaged update over that of the adapter, for rank 4 (cat: 8) and alpha 4:
#   LoRA linear 2, cat 1, svd 1; rsLoRA linear 4, cat 2.83, svd 2; DoRA linear 2, cat 1, svd 1, but trained magnitudes are
#   gone. Averaging the merged weights of the models is right for all three.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
kinds = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
expected = {"LoRA": (2, 1, 1), "rsLoRA": (4, 8**0.5, 2), "DoRA": (2, 1, 1)}
texts = torch.arange(6)[None]
for kind, flags in kinds.items():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["query"], init_lora_weights=False, **flags)
    model = get_peft_model(BertModel(BertConfig(vocab_size=8, **sizes)), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    state = model.state_dict()
    for name, tensor in state.items():
        if "magnitude" in name and ".a." in name:
            tensor.mul_(1.5)  # as if it had been trained
    for name, tensor in state.items():
        if ".b." in name:
            tensor.copy_(state[name.replace(".b.", ".a.")])
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    lengths, vectors, magnitudes = {}, {}, {}
    for name in ("a", "b", "linear", "cat", "svd"):
        if name not in model.peft_config:
            model.add_weighted_adapter(["a", "b"], [0.5, 0.5], name, combination_type=name)
        model.set_adapter(name)
        vectors[name] = model(texts).last_hidden_state
        lengths[name] = float(layer.get_delta_weight(name).norm())
        if kind == "DoRA":
            magnitudes[name] = float(layer.lora_magnitude_vector[name].weight.norm())
    ratios = {name: round(lengths[name] / lengths["a"], 3) for name in ("linear", "cat", "svd")}
    apart = {name: float((vectors[name] - vectors["a"]).abs().max()) for name in lengths}
    print(f"{kind:6} update over a's {ratios}; vectors apart by { {name: round(far, 4) for name, far in apart.items()} }")
    assert apart["b"] == 0, "the two adapters are not equal"
    assert all(abs(ratio - right) < 0.01 for ratio, right in zip(ratios.values(), expected[kind])), "it has changed"
    for name in ("cat", "svd"):
        assert (apart[name] < 1e-5) == (kind == "LoRA"), f"{kind} by {name} has changed"
    if kind == "DoRA":
        print(f"       length of the magnitudes { {name: round(length, 3) for name, length in magnitudes.items()} }")
        assert magnitudes["cat"] < 0.9 * magnitudes["a"], "magnitudes are averaged now"
PYTHON
