#!/usr/bin/env bash
# Train the zoo's drafters for SmolLM2 on one GPU: the target writes a corpus, five drafters learn from it side by side.
#
#   scripts/zoo.sh PROMPTS_FOLDER EVALUATION_FILE OUT_FOLDER [CORPUS_MINUTES] [TRAIN_MINUTES]
#
# A target this small leaves most of a large GPU idle, so corpus and training run as several processes at once.
# Killed and started again, every step goes on where it was.
set -uo pipefail
prompts=$1 evaluation=$2 out=$3 corpus_minutes=${4:-2} train_minutes=${5:-5}
mkdir -p "$out/logs"
outpace() { python3 -m outpace.cli "$@"; }

writers=()
for temperature in 0 0.7 1; do
  outpace corpus smollm2 --out "$out/corpus" --prompts "$prompts" --exclude "$evaluation" --temperatures "$temperature" \
    --max-new-tokens 384 --max-prompt 640 --max-batch 192 --shard 256 --minutes "$corpus_minutes" \
    > "$out/logs/corpus-$temperature.log" 2>&1 &
  writers+=($!)
  sleep 4 # the first one writes corpus.json
done
wait "${writers[@]}"
ls "$out/corpus" | wc -l

train() { # name spec minutes [options]
  outpace train smollm2 --drafter "$2" --corpus "$out/corpus" --out "$out/$1" --minutes "$3" --optimizer adamw \
    --eval-every 0 --eval-prompts 16 --eval-tokens 96 --save-every 0 "${@:4}" > "$out/logs/train-$1.log" 2>&1
}
train eagle3 "eagle3:nodes=31,draft_len=7" "$train_minutes" &
train ptp "ptp:any_temperature=true,rank=64" "$train_minutes" &
train mask "ptp:mode=mask,any_temperature=true,rank=64" "$train_minutes" &
(train mtp "mtp:nodes=31" "$(python3 -c "print(0.55 * $train_minutes)")"; train medusa "medusa:nodes=31" "$(python3 -c "print(0.3 * $train_minutes)")") &
wait
tail -n 3 "$out"/logs/*.log
