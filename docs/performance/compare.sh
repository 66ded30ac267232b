#!/usr/bin/env bash
# Ours and llama.cpp's on this machine, in turns, one after the other: docs/performance/compare.sh LLAMA_BENCH_DIR WORK_DIR
#
# LLAMA_BENCH_DIR holds llama-bench and llama-quantize, built by you (llama.cpp's source also comes inside PyPI's
# llama-cpp-python sdist). WORK_DIR takes about 25 GB of random models, which are kept. Needs python3 with numpy and gguf.
set -euo pipefail
tools=$1 work=$2
here=$(cd "$(dirname "$0")" && pwd)
overfill=$here/../../target/release/overfill
threads=$(nproc)
prefill_tokens=${PREFILL_TOKENS:-512} decode_tokens=${DECODE_TOKENS:-32} runs=${RUNS:-3}
mkdir -p "$work"

# llama.cpp's quantised types want multiples of 32: the pruned widths, 1689 and 4505, are padded for it, not for us.
for model in full:3072:8192 pruned:1696:4512; do
    IFS=: read -r name hidden intermediate <<<"$model"
    [ -f "$work/$name-bf16.gguf" ] || python3 "$here/random_gguf.py" "$work/$name-bf16.gguf" "$hidden" "$intermediate"
    for type in Q8_0 Q4_0; do
        [ -f "$work/$name-$type.gguf" ] ||
            "$tools/llama-quantize" "$work/$name-bf16.gguf" "$work/$name-$type.gguf" "$type" >/dev/null 2>&1
    done
done

for pair in bf16:bf16 Q8_0:int8 Q4_0:int4; do
    theirs=${pair%:*} ours=${pair#*:}
    for model in ${MODELS:-pruned:llama-3.2-3b-overfill full:llama-3.2-3b}; do
        echo "== ${model%:*}, $theirs against $ours"
        "$tools/llama-bench" -m "$work/${model%:*}-$theirs.gguf" -t "$threads" -r "$runs" -p "$prefill_tokens" \
            -n "$decode_tokens" 2>/dev/null
        "$overfill" bench engine --geometry "${model#*:}" --models-dir "$work" --weights "$ours" --runs "$runs" \
            --prefill-tokens "$prefill_tokens" --decode-tokens "$decode_tokens" 2>/dev/null
    done
done
