#!/usr/bin/env bash
# One slide, shared by the tasks of an array; the merge starts when all of them have ended:
#   id=$(sbatch --parsable --array=1-8 examples/slurm_slide.sh slide.svs results --seeds seeds.json)
#   sbatch --dependency=afterany:"$id" --mem=8G --wrap 'wsiseg merge results/slide'
# What follows `results` goes to `wsiseg run`. The merge refuses a run with holes and names them; then submit both again.
#SBATCH --job-name=wsiseg
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --gres=gpu:1
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# The warning comes to this shell alone, which passes it on; TERM, of scancel or the time limit, comes to wsiseg as well. Either ends `wait`.
asked='' again=yes
trap 'asked=yes again=yes; kill -USR1 "${!:-}" 2> /dev/null || true' USR1
trap 'again=yes' TERM
wsiseg run "$1" --out "$2" --shard slurm "${@:3}" &
while [ -n "$again" ]; do
    again='' status=0
    wait $! || status=$?
done

# Out of time and not finished: back into the queue. Only this task; the job's number alone could mean the whole array.
if [ -n "$asked" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
