#!/usr/bin/env bash
# A model saved by sentence-transformers 6 needs 6.0.0 to load if it ends in Normalize, although the module paths of
# Transformer and Pooling exist since 5.4.0: Normalize alone moved to sentence_transformers.base.modules in 6.0.0.
# 5.4.0 to 5.7.0 have it in sentence_transformers.sentence_transformer.modules, and load such a folder once modules.json
# names that path. Seen with 5.4.0, 5.7.0, 6.0.0 and 6.2.0; the wheels alone are looked at, so no torch is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check --quiet"
seen=""
for version in 5.4.0 5.7.0 6.0.0 6.2.0; do
    $pip install --no-deps --target "$folder/$version" "sentence-transformers==$version"
    package="$folder/$version/sentence_transformers"
    found=$version
    for module in base/modules/transformer sentence_transformer/modules/pooling base/modules/normalize; do
        [ -e "$package/$module.py" ] && found+=" yes" || found+=" no"
    done
    echo "sentence-transformers $found (base Transformer, Pooling, base Normalize)"
    seen+="$found;"
done
expected="5.4.0 yes yes no;5.7.0 yes yes no;6.0.0 yes yes yes;6.2.0 yes yes yes;"
[ "$seen" = "$expected" ]
# what 6.2.0 writes into modules.json is the class's own module
grep -q "^class Normalize" "$folder/6.2.0/sentence_transformers/base/modules/normalize.py"
