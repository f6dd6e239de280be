#!/bin/bash
# One slide, shared by the subjobs of a PBS Professional array; the merge starts when all of them have ended:
#   id=$(qsub -v SLIDE=slide.svs,OUT=results,SEEDS=seeds.json examples/pbs_array.sh)
#   qsub -W depend=afterany:"$id" -- "$(command -v wsiseg)" merge "$PWD/results/slide"
# SEEDS may be left out; other settings go into a file, CONFIG=settings.toml. The merge refuses a run with holes and names them; then submit both again.
#PBS -N wsiseg
#PBS -J 1-8
#PBS -l select=1:ncpus=4:mem=16gb:ngpus=1
#PBS -l walltime=08:00:00
#PBS -j oe
set -euo pipefail

shards=${SHARDS:-8} # PBS does not tell a subjob how many there are: with -J 1-16, also SHARDS=16 among the variables
cd "$PBS_O_WORKDIR"
export PATH="$PBS_O_PATH" # where wsiseg was at qsub
exec wsiseg run "$SLIDE" --out "$OUT" --shard "$PBS_ARRAY_INDEX/$shards" ${SEEDS:+--seeds "$SEEDS"} ${CONFIG:+--config "$CONFIG"}
