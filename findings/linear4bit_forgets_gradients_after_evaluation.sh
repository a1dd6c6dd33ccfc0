#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0, on a CPU with AVX512-BF16: one evaluation ends QLoRA training without an error.
#
# A good guess is that model.eval(), a forward pass under no_grad and model.train() leave a Linear4bit as it was. On such a
# processor the first forward in eval mode whose input needs no gradient packs the weights for a kernel of their own; they
# stay packed, and that kernel has no backward. What should flow back through the frozen weights is missing from then on:
# adapters of earlier layers learn from what passes the later adapters alone. torch warns once, nothing else is said.
# Seen: the gradient of the input is there before the evaluation, and None after it. Widths are multiples of 64 here.
# On other processors there is no such kernel, and this script says so and stops.
set -euo pipefail
grep -q avx512_bf16 /proc/cpuinfo || { echo "no AVX512-BF16 here: not to be seen on this processor"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import bitsandbytes
import torch

layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")


def has_gradient():
    layer.train()
    inputs = torch.ones(3, 64, requires_grad=True)
    return torch.autograd.grad(layer(inputs).pow(2).sum(), inputs, allow_unused=True)[0] is not None


before = has_gradient()
layer.eval()
with torch.no_grad():
    layer(torch.ones(3, 64))
after = has_gradient()
print(f"gradient of the input before an evaluation: {before}, after it: {after}")
assert before, "4-bit layers give no gradients at all here"
assert not after, "the weights are unpacked again, or the kernel has a backward now"
PYTHON
