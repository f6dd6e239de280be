#!/usr/bin/env bash
# One slide per task. SLIDES.txt has one path per line:
#   sbatch --array=1-$(wc -l < SLIDES.txt) examples/slurm_array.sh SLIDES.txt RESULTS
# A slide's clicks lie beside it: scan.svs and scan.seeds.json, or scan.geojson exported from QuPath. Without, cells are outlined but not typed.
# A task that was stopped is submitted again as it was; it goes on where it stood.
#SBATCH --job-name=wsiseg
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --gres=gpu:1
#SBATCH --time=08:00:00
set -euo pipefail

list=$1
out=$2
slide=$(sed -n "${SLURM_ARRAY_TASK_ID:?submit this with sbatch --array}p" "$list")
[ -n "$slide" ] || { echo "$list has no line $SLURM_ARRAY_TASK_ID" >&2; exit 2; }

seeds=()
for file in "${slide%.*}.seeds.json" "${slide%.*}.geojson"; do
    if [ -f "$file" ]; then seeds=(--seeds "$file"); break; fi
done

exec wsiseg run "$slide" ${seeds[@]+"${seeds[@]}"} --out "$out" # the odd form is for bash 4.2, to which an empty array is unset
