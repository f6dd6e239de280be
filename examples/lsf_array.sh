#!/bin/bash
# One slide, shared by the elements of an LSF array; the merge starts when all of them have ended. NUMBER is what the first bsub prints:
#   SLIDE=slide.svs OUT=results SEEDS=seeds.json bsub < examples/lsf_array.sh
#   bsub -w 'numended(NUMBER, *)' wsiseg merge results/slide
# SEEDS may be left out; other settings go into a file, CONFIG=settings.toml. The merge refuses a run with holes and names them; then submit both again.
#BSUB -J "wsiseg[1-8]"
#BSUB -n 4
#BSUB -R "span[hosts=1] rusage[mem=16GB]"
#BSUB -gpu num=1
#BSUB -W 8:00
#BSUB -wa USR1
#BSUB -wt 2
#BSUB -Q 99
#BSUB -o wsiseg.%J.%I.log
set -euo pipefail

asked=''
trap 'asked=yes' USR1 # two minutes before the time limit LSF signals all processes of the job; wsiseg stops, this shell takes note
status=0
wsiseg run "$SLIDE" --out "$OUT" --shard "$LSB_JOBINDEX/$LSB_JOBINDEX_END" ${SEEDS:+--seeds "$SEEDS"} ${CONFIG:+--config "$CONFIG"} || status=$?
if [ -n "$asked" ] && [ "$status" -ne 0 ]; then exit 99; fi # out of time, not finished: back into the queue
exit "$status"
