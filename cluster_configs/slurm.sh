#!/usr/bin/env bash
# A Ray cluster inside a Slurm job, for one recipe: sbatch cluster_configs/slurm.sh RECIPE [options of `trueweight run`]
#
# Home, recipe and store lie on a filesystem that all nodes see. TRUEWEIGHT_PYTHON names the Python that has Trueweight.
#SBATCH --job-name=trueweight
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

recipe=${1:?usage: sbatch slurm.sh RECIPE [options of trueweight run]}
shift
python=${TRUEWEIGHT_PYTHON:-python3}
name=slurm-$SLURM_JOB_ID
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs may share a node
cpus=${SLURM_CPUS_PER_TASK:-1}
folder=$HOME/.trueweight/cluster
logs=$folder/$name/logs
export python name port cpus folder

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
steps=()
run=

teardown() {
    trap - EXIT TERM INT
    # First the run, which saves; then the nodes, the head last.
    [ -z "$run" ] || { kill -TERM "$run" 2>/dev/null || true; wait "$run" 2>/dev/null || true; }
    for ((i = ${#steps[@]} - 1; i >= 0; i--)); do
        kill -TERM "${steps[i]}" 2>/dev/null || true
        wait "${steps[i]}" 2>/dev/null || true
    done
    rm -f "$folder/$name/token" "$folder/$name/ca.key" "$folder/$name/hosts/"*/host.key
}
trap teardown EXIT
trap 'exit 143' TERM INT

# What each node runs: its own certificate, a folder of its own for Ray, then Ray until the step is ended.
node='
set -euo pipefail
own=$(hostname -I | cut -d" " -f1)
eval "$("$python" -m trueweight cluster keys "$name" --folder "$folder" --here "$own")"
export RAY_USAGE_STATS_ENABLED=0
scratch=$(mktemp -d "${TMPDIR:-/tmp}/tw-XXXXXX") # a long TMPDIR is not for Ray: sockets take 107 characters
trap "rm -rf $scratch" EXIT
if [ "$1" = head ]; then
    where=(--head "--port=$port" "--ray-client-server-port=$((port + 10000))" --include-dashboard=false)
    printf "%s" "$own" >"$folder/$name/head"
else
    where=("--address=$(cat "$folder/$name/head"):$port")
fi
"$python" -m ray.scripts.scripts start --block "${where[@]}" "--node-ip-address=$own" "--num-cpus=$cpus" \
    "--labels=trueweight.host=$2" "--temp-dir=$scratch" &
ray=$!
trap "kill -TERM $ray 2>/dev/null || true; wait $ray || true; rm -rf $scratch" EXIT
trap "exit 0" TERM INT
wait $ray
'

mkdir -p "$logs"
"$python" -m trueweight cluster keys "$name" --folder "$folder" # the token, before the head
srun --nodes=1 --ntasks=1 --overlap -w "${nodes[0]}" bash -c "$node" node head "${nodes[0]}" >"$logs/${nodes[0]}" 2>&1 &
steps+=($!)
for ((second = 0; ; second++)); do
    [ -s "$folder/$name/head" ] && (exec 3<>"/dev/tcp/$(cat "$folder/$name/head")/$port") 2>/dev/null && break
    kill -0 "${steps[0]}" 2>/dev/null && [ "$second" -lt 120 ] || {
        echo "slurm.sh: the head did not start within 120 s; see $logs/${nodes[0]}" >&2
        exit 70
    }
    sleep 1
done
for other in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap -w "$other" bash -c "$node" node worker "$other" >"$logs/$other" 2>&1 &
    steps+=($!)
done

driver='
set -euo pipefail
own=$(hostname -I | cut -d" " -f1)
eval "$("$python" -m trueweight cluster keys "$name" --folder "$folder" --here "$own")"
exec "$python" -m trueweight run "$@" --address "$own:$port"
'
srun --nodes=1 --ntasks=1 --overlap -w "${nodes[0]}" bash -c "$driver" driver "$recipe" "$@" &
run=$!
code=0
wait "$run" || code=$?
run=
exit "$code"
