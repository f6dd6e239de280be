#!/usr/bin/env bash
# Many slides, one per task. SLIDES.txt has one path per line; what follows RESULTS goes to `wsiseg run`:
#   sbatch --array=1-$(wc -l < SLIDES.txt) examples/slurm_array.sh SLIDES.txt RESULTS
# A slide's clicks lie beside it: scan.svs and scan.seeds.json, or scan.geojson exported from QuPath. Without, cells are outlined but not typed.
# Two minutes before the time limit a task ends by itself, with status 3. Submit the same array again to resume.
#SBATCH --job-name=wsiseg
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --gres=gpu:1
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
set -euo pipefail

list=$1
out=$2
slide=$(sed -n "${SLURM_ARRAY_TASK_ID:?submit this with sbatch --array}p" "$list")
[ -n "$slide" ] || { echo "$list has no line $SLURM_ARRAY_TASK_ID" >&2; exit 2; }

seeds=()
for file in "${slide%.*}.seeds.json" "${slide%.*}.geojson"; do
    if [ -f "$file" ]; then seeds=(--seeds "$file"); break; fi
done

# exec: the signal must reach wsiseg, not this shell. The odd form of seeds is for bash 4.2, to which an empty array is unset.
exec wsiseg run "$slide" ${seeds[@]+"${seeds[@]}"} --out "$out" "${@:3}"
