#!/usr/bin/env bash
# Train the zoo's drafters for SmolLM2 on one GPU: the target writes a corpus, the drafters learn from it in turn.
#
#   scripts/zoo.sh PROMPTS_FOLDER EVALUATION_FILE OUT_FOLDER [CORPUS_MINUTES] [UNIT_MINUTES] [GERMAN.po ...]
#
# First the prompts are answered, then prompts that are made of the answers (scripts/derive_prompts.py). Three processes
# write, one per temperature: the host is what limits them. Trainings run one after the other (side by side they are
# slower; docs/log.md); UNIT_MINUTES scales them all. Killed and started again, every step goes on where it was.
set -uo pipefail
prompts=$1 evaluation=$2 out=$3 corpus_minutes=${4:-3} unit=${5:-1}
shift $(($# < 5 ? $# : 5))
mkdir -p "$out/logs" "$out/derived"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
outpace() { python3 -m outpace.cli "$@"; }

write() { # prompts, name of the log
  local writers=()
  for temperature in 0 0.7 1; do
    outpace corpus smollm2 --out "$out/corpus" --prompts "$1" --exclude "$evaluation" --temperatures "$temperature" \
      --max-new-tokens 384 --max-prompt 1152 --max-batch 192 --shard 256 --minutes "$corpus_minutes" \
      > "$out/logs/corpus-$2-$temperature.log" 2>&1 &
    writers+=($!)
    sleep 4 # the first one writes corpus.json
  done
  wait "${writers[@]}"
}
write "$prompts" first
python3 "$(dirname "$0")/derive_prompts.py" "$out/corpus" "$out/derived/derived.jsonl" --german "$@"
write "$out/derived" derived

train() { # name spec units, further options
  outpace train smollm2 --drafter "$2" --corpus "$out/corpus" --out "$out/$1" --optimizer adamw --eval-every 0 \
    --eval-prompts 32 --eval-tokens 96 --rows 16 --minutes "$(python3 -c "print($3 * $unit)")" "${@:4}" \
    > "$out/logs/train-$1.log" 2>&1
  tail -n 1 "$out/logs/train-$1.log"
}
train eagle3 "eagle3:layers=1,vocabulary=16384,draft_len=7,nodes=31" 9
train mtp "mtp:vocabulary=12288,nodes=31" 1.3
train medusa "medusa:vocabulary=12288,nodes=31" 0.8
train ptp "ptp:mode=mask,sampler=eagle,slots=6,rank=16,vocabulary=16384,branches=8,nodes=31" 7.5 --begin-with "$out/eagle3" --keep-gib 60
train mask "ptp:mode=mask,rank=40,slots=6,any_temperature=true" 7.5
