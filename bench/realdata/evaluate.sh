#!/usr/bin/env bash
# What DINOv2 ViT-S/14 keeps at 448 px, 1,025 tokens, with linear attention: trains its students under runs/ and
# evaluates them beside the teacher. Some 3 hours on two CPU cores, which must have nothing else to do: speed is measured,
# too. What an earlier call has finished is not repeated.
# `python bench/evaluations.py` then puts the results into docs/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH"
ranks=${RANKS:-2}
# As the recipe has it, so that the commands in the results are everybody's.
real='~/.cache/adala-real'
recipe=(--recipe dinov2_small --tensorboard false)
students=(linearized runs/real448/stage1 runs/real448/stage2)

# train RUN STAGE OPTION...
train() {
    [[ -f runs/$1/stage$2/finished.json ]] || OMP_NUM_THREADS=1 deepspeed --num_gpus "$ranks" launchers/train.py \
        "${recipe[@]}" --run_name "$1" --stage "$2" "${@:3}"
}

# scored SET SIZE TASK: the options of a labelled set, as $scored.
scored() {
    scored=(--data.image_size "[$2, $2]" --data.val "$real/$1/val-*.tar"
        --evaluation.probe_train "$real/$1/train-*.tar" --stage3.task "$3")
}

# evaluate NAME PASS MEASURES OPTION...: on all ranks, into runs/PASS-NAME.
evaluate() {
    [[ -f runs/$2-$1/evaluation.json ]] || OMP_NUM_THREADS=1 deepspeed --num_gpus "$ranks" launchers/evaluate.py \
        "${recipe[@]}" "${scored[@]}" --run_name real448 --out "runs/$2-$1" --protocol dinov2_linear \
        --protocol.precision bf16 --protocol.measures "$3" "${@:4}"
}

# clocked NAME MEASURES BATCH OPTION...: in one process with nothing beside it, since speed is measured, too.
clocked() {
    [[ -f runs/frozen-$1/evaluation.json ]] || OMP_NUM_THREADS=$ranks python launchers/evaluate.py \
        "${recipe[@]}" "${scored[@]}" --run_name real448 --out "runs/frozen-$1" --protocol dinov2_linear \
        --protocol.precision bf16 --protocol.measures "[$2, speed]" --protocol.speed.batch_size "$3" \
        --protocol.speed.rounds 10 --models "${students[@]}" --pictures "${@:4}"
}

# frozen NAME MEASURES BATCH OPTION...: leaves the features that the measures need on the disk, and measures from there.
frozen() {
    evaluate "$1" features "[$2]" --models "${students[@]}" "${@:4}" --protocol.segmentation.epochs 1 \
        --protocol.probe.epochs 1
    clocked "$@"
}

# tuned SET CLASSES HEAD...: teacher and student with each head, on crops of 224 px; scored at 448 px.
tuned() {
    local head options models=()
    for head in "${@:3}"; do
        scored "$1" 448 "{name: segmentation, num_classes: $2, head: $head}"
        options=("${scored[@]}" --stage3.train_data "$real/$1/train-*.tar" --stage3.image_size '[224, 224]'
            --stage3.augmentation scale --stage3.global_batch_size 16 --stage3.micro_batch_size 4
            --stage3.steps 100 --stage3.lr 2.0e-5 --stage3.head_lr 1.0e-3)
        train "$1-teacher-$head" 3 "${options[@]}" --mechanism softmax --stage3.start_from linearized
        train "$1-student-$head" 3 "${options[@]}" --stage3.start_from runs/real448/stage2
        models+=("runs/$1-teacher-$head/stage3" "runs/$1-student-$head/stage3")
    done
    evaluate "$1" tuned '[head]' --models "${models[@]}" --pictures
}

for stage in 1 2; do
    train real448 "$stage" --data.image_size '[448, 448]' --stage1.image_size '[112, 112]' --stage2.image_size '[112, 112]'
done

declare -A task=([earth]='{name: segmentation, num_classes: 6}' [scenes]='{name: segmentation, num_classes: 13}'
    [stamps]='{name: classification, num_classes: 12}' [fashion]='{name: classification, num_classes: 10}')
# DINOv2's epochs are 40,000 steps for masks and 12,500 for classes on its large sets, and a few on small ones, in which
# nothing is learnt: 1,000 and more here. Of the larger sets a part, which a CPU gets through.
all_earth=(--protocol.segmentation.epochs 200)
all_stamps=(--protocol.probe.epochs 1000)
some_scenes=(--protocol.segmentation.train_samples 400 --protocol.segmentation.epochs 50)
some_fashion=(--protocol.probe.train_samples 5000 --protocol.probe.epochs 200)

scored=(--data.image_size '[448, 448]')
clocked photos 'features, blocks' 1 --protocol.blocks.images 16
scored earth 448 "${task[earth]}"
frozen earth segmentation 1 "${all_earth[@]}"
scored stamps 448 "${task[stamps]}"
frozen stamps 'knn, probe' 1 "${all_stamps[@]}"
scored scenes 448 "${task[scenes]}"
frozen scenes segmentation 1 "${some_scenes[@]}"
# At 28 px, 112 are an enlargement already; all 280,000 images at 448 px would be a day.
scored fashion 112 "${task[fashion]}"
frozen fashion 'knn, probe' 32 "${some_fashion[@]}"
tuned earth 6 linear pmt
tuned scenes 13 linear
