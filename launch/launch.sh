# shellcheck shell=bash
# Shared by the launch scripts, which source this file and call `launch`. README.md lists the settings.
#
# On a SLURM login node the calling script is submitted; inside an allocation one rank per GPU is started with srun;
# without SLURM, torchrun starts the ranks on this machine.

SETTINGS=(RECIPE NODES GPUS_PER_NODE TP PP DATA TOKENIZER INIT RUN_DIR EXTRA PYTHON MAX_RESTARTS CONTAINER CONTAINER_MOUNTS)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf 'launch: %s\n' "$*" >&2; }
die() { say "${*:2}"; exit "$1"; }
show() { printf '%q ' "$@"; printf '\n'; }

# launch NAME RECIPE NODES: NAME is the calling script without .sh; the other two are its defaults.
launch() {
  take_paths_from_here
  cd "$ROOT" || exit
  RECIPE=${RECIPE:-launch/recipes/$2}
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=$ROOT/.venv/bin/python; fi
  fi
  read_recipe
  RANK_PYTHON=$PYTHON CONTAINER_OPTIONS=()
  if [ -n "${CONTAINER:-}" ]; then take_container; fi
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    if ! { command -v srun >/dev/null && cluster_here; }; then
      die 2 "SLURM_JOB_ID is $SLURM_JOB_ID, but srun has no cluster here; to start on this machine: unset SLURM_JOB_ID"
    fi
    if job_is_over; then
      die 2 "SLURM_JOB_ID is $SLURM_JOB_ID, a job that has ended; to start anew: unset SLURM_JOB_ID"
    fi
    run_allocation
  elif slurm_here; then
    submit "$1" "${NODES:-$3}"
  else
    run_here
  fi
}

# Relative paths start at the caller's directory, but the commands run in the repository.
take_paths_from_here() {
  local name
  if [ -f "${CONTAINER:-}" ]; then CONTAINER=$(realpath "$CONTAINER"); fi
  [ "$PWD" != "$ROOT" ] || return 0
  for name in DATA TOKENIZER INIT RUN_DIR; do
    case ${!name:-/} in /*) ;; *) printf -v "$name" %s "$PWD/${!name}" ;; esac
  done
  if [ -n "${RECIPE:-}" ] && [ -f "$RECIPE" ]; then RECIPE=$(realpath "$RECIPE"); fi
}

# What the recipe says, and the settings as its overrides. A wrong recipe or setting fails here, before a job waits in the
# queue. NULs end the answers, because a path may hold anything else.
read_recipe() {
  local name facts
  for name in NODES GPUS_PER_NODE MAX_RESTARTS; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ || $name${!name} = MAX_RESTARTS0 ]] ||
      die 2 "$name: ${!name} is not a whole number; give one such as 8"
  done
  for name in "${SETTINGS[@]}"; do
    if [ -n "${!name:-}" ]; then export "${name?}"; fi
  done
  mapfile -d '' -t facts < <("$PYTHON" -m launch.recipe_facts "$RECIPE")
  wait $! || exit $?
  RUN=${facts[0]} CHECKPOINTS=${facts[1]} MODEL_RANKS=${facts[2]}
  INPUTS=("${facts[@]:4:facts[3]}") OVERRIDES=("${facts[@]:4+facts[3]}")
}

check_world() {
  [ $(($1 % MODEL_RANKS)) = 0 ] ||
    die 2 "$1 processes are no multiple of parallel.tensor x parallel.pipeline = $MODEL_RANKS; change NODES, GPUS_PER_NODE, TP or PP"
}

slurm_here() { command -v sbatch >/dev/null && cluster_here; }

# SLURM's programs may be installed without a cluster; a cluster whose controller is down still counts.
cluster_here() {
  case $(scontrol ping 2>&1 || :) in
    *'configuration source'* | *'unable to status file'*) return 1 ;;
  esac
}

# Whether SLURM says so; a controller that is down says nothing.
job_is_over() {
  local state
  if ! state=$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>&1); then
    [[ $state = *'Invalid job id'* ]]
    return
  fi
  [ -z "$state" ]
}

# --- on a login node --------------------------------------------------------------------------------------------------

submit() {
  local nodes=$2 gpus=() command
  GPUS_PER_NODE=${GPUS_PER_NODE:-8}
  check_world $((nodes * GPUS_PER_NODE))
  # A cluster that declares no GPUs would refuse a request for some.
  if sinfo -h -o %G ${SBATCH_PARTITION:+-p "$SBATCH_PARTITION"} 2>/dev/null | grep -q gpu; then
    gpus=("--gres=gpu:$GPUS_PER_NODE")
  fi
  command=(sbatch --nodes="$nodes" --ntasks-per-node="$GPUS_PER_NODE" "${gpus[@]}" --export=ALL
    --output="${RUN//%/%%}/slurm-%j.out" "launch/$1.sh")
  if [ "${DRY_RUN:-}" = 1 ]; then
    show "${command[@]}"
    run_allocation "$nodes"
    return
  fi
  mkdir -p "$RUN" || die 5 "run.dir: $RUN cannot be made; set RUN_DIR to a directory that can be written"
  say "output goes to $RUN/slurm-<job>.out"
  "${command[@]}"
}

# --- inside an allocation ---------------------------------------------------------------------------------------------

# run_allocation [NODES]
run_allocation() {
  local nodes=${1:-${NODES:-${SLURM_JOB_NUM_NODES:-1}}}
  local per_node=${GPUS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}}
  local host='<first node>' cpus command
  check_world $((nodes * per_node))
  if [ -n "${SLURM_JOB_ID:-}" ]; then host=$(first_host); fi
  cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-0} / per_node))}
  # -n is stated because SLURM_NTASKS of the job would override --ntasks-per-node.
  command=(srun -N "$nodes" -n $((nodes * per_node)) --ntasks-per-node="$per_node" --kill-on-bad-exit=1 --export=ALL)
  if [ "$cpus" -gt 0 ]; then command+=(--cpus-per-task="$cpus"); fi
  command+=("${CONTAINER_OPTIONS[@]}")
  # Ports below 30000 are outside the range that Linux hands out by itself.
  export MASTER_ADDR=$host MASTER_PORT=$((10000 + ${SLURM_JOB_ID:-0} % 20000)) LOCAL_WORLD_SIZE=$per_node
  # shellcheck disable=SC2016  # the variables are each task's own
  command+=(bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' rank
    "$RANK_PYTHON" -m megavl train "$RECIPE" "${OVERRIDES[@]}")
  if [ "${DRY_RUN:-}" = 1 ]; then
    show env MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" LOCAL_WORLD_SIZE="$LOCAL_WORLD_SIZE" "${command[@]}"
    return
  fi
  if [ -n "${CONTAINER:-}" ]; then
    mkdir -p "$RUN" "$CHECKPOINTS" || die 5 "run.dir: $RUN cannot be made; set RUN_DIR to a directory that can be written"
  fi
  supervise "${command[@]}"
  after_srun
}

# Options of pyxis for the image CONTAINER, whose `python` runs the ranks. The repository is mounted, so they run the code that
# read the recipe. So are the folders that they write, which would end with the container, and read-only what they read.
take_container() {
  local path entry theirs written='' read='' mounts mounted=()
  for path in "$ROOT" "$RUN" "$CHECKPOINTS"; do
    mount_path "$path" ''
    written+=$mounts
  done
  IFS=, read -ra theirs <<<"${CONTAINER_MOUNTS:-}"
  for entry in "${theirs[@]}"; do
    entry=${entry#*:}
    mounted+=("${entry%%:*}")
  done
  for path in "${INPUTS[@]}"; do
    [ -e "$path" ] || continue
    mount_path "$path" :ro
    read+=$mounts
  done
  # A folder that is written may lie in one that is read, so it is mounted after that.
  mounts=$read$written${CONTAINER_MOUNTS:-}
  RANK_PYTHON=python
  CONTAINER_OPTIONS=("--container-image=$CONTAINER" "--container-mounts=${mounts%,}" "--container-workdir=$ROOT"
    --no-container-entrypoint)
}

# mount_path PATH FLAGS: leaves in `mounts` what shows PATH in the container by its name, and by its name without links.
# A name below one that is `mounted` is there already.
mount_path() {
  local here inside folder
  here=$(realpath -m -- "$1")
  mounts=
  for inside in "$(realpath -ms -- "$1")" "$here"; do
    for folder in "${mounted[@]}"; do
      case $inside/ in "${folder%/}"/*) continue 2 ;; esac
    done
    case $here:$inside in
      *[,:]*:* | *:*[,:]*)
        die 2 "CONTAINER: $1 cannot be mounted, because its name has a comma or a colon; choose another one"
        ;;
    esac
    mounts+=$here:$inside$2,
    mounted+=("$inside")
  done
}

first_host() {
  local hosts
  hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null) || hosts=
  hosts=${hosts%%$'\n'*}
  printf %s "${hosts:-${SLURMD_NODENAME:-$(hostname)}}"
}

# Requeue the job after 75 (saved), and after a lost peer or a killed rank as long as checkpoints advance. Every other end
# would repeat itself.
after_srun() {
  case $STATUS in
    0) rm -f "$RUN/restarts" ;;
    75)
      say "pre-empted and saved; requeueing"
      requeue
      ;;
    130) say "stopped by Ctrl-C; not requeued. Start the same command again to go on from the last checkpoint" ;;
    7) requeue_bounded "a rank was lost or hung" ;;
    129 | 13[1-9] | 14[0-9] | 15[0-9]) requeue_bounded "a rank was killed by signal $((STATUS - 128))" ;;
    *) say "ended with code $STATUS; not requeued, because it would end so again. Reason: $RUN/exit_status.json" ;;
  esac
  exit "$STATUS"
}

requeue() {
  # A cancelled job must stay cancelled, and SLURM itself requeues jobs that it ends for other reasons.
  case $(squeue -h -j "$SLURM_JOB_ID" -o '%T %r' 2>/dev/null || :) in
    'COMPLETING TimeLimit') ;;
    COMPLETING*)
      say "job $SLURM_JOB_ID was cancelled or is being requeued by SLURM; left alone"
      return
      ;;
  esac
  scontrol requeue "$SLURM_JOB_ID" ||
    say "SLURM did not requeue job $SLURM_JOB_ID; start the same command again to go on from the last checkpoint"
}

requeue_bounded() {
  local limit=${MAX_RESTARTS:-5} progress last='' count=0
  progress=$(newest_checkpoint)
  if [ -r "$RUN/restarts" ]; then read -r last count <"$RUN/restarts" || :; fi
  [ "$last" = "$progress" ] || count=0
  if [ "$count" -ge "$limit" ]; then
    rm -f "$RUN/restarts"
    die 1 "$1, and $count restarts brought no checkpoint after $progress; giving up. Reason: $RUN/exit_status.json"
  fi
  mkdir -p "$RUN"
  echo "$progress $((count + 1))" >"$RUN/restarts"
  say "$1; restart $((count + 1)) of at most $limit without a checkpoint after $progress"
  requeue
}

# Name of the newest committed checkpoint directory, or `none`.
newest_checkpoint() {
  local manifest newest=none
  for manifest in "$CHECKPOINTS"/iter_*/manifest.json; do
    if [ -f "$manifest" ]; then newest=$(basename "$(dirname "$manifest")"); fi
  done
  printf %s "$newest"
}

# --- on this machine --------------------------------------------------------------------------------------------------

run_here() {
  local ranks command
  [ "${NODES:-1}" = 1 ] || die 2 "NODES=$NODES needs SLURM, and there is none here; unset NODES to use this machine"
  [ -z "${CONTAINER:-}" ] ||
    die 2 "CONTAINER=$CONTAINER needs SLURM with pyxis; unset it, or start this script inside of the image"
  ranks=${GPUS_PER_NODE:-$(gpus_here)}
  if [ "$ranks" = 0 ]; then ranks=$MODEL_RANKS; fi
  check_world "$ranks"
  # By default torchrun dies of USR1 while its ranks live on, and kills a save that takes longer than 30 s. `end_leftovers`
  # ends ranks that outlive a failure sooner.
  command=("$PYTHON" -m torch.distributed.run --standalone --nnodes=1 --nproc-per-node="$ranks" --max-restarts=0
    "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1" --shutdown-timeout=600
    -m megavl train "$RECIPE" "${OVERRIDES[@]}")
  if [ "${DRY_RUN:-}" = 1 ]; then
    show "${command[@]}"
    return
  fi
  supervise "${command[@]}"
  if [ "$STATUS" = 75 ]; then say "stopped and saved; start the same command again to go on"; fi
  exit "$STATUS"
}

gpus_here() {
  if ! command -v nvidia-smi >/dev/null; then
    echo 0
  elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || :
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || :
  fi
}

# --- both -------------------------------------------------------------------------------------------------------------

# supervise COMMAND...: runs it, passes signals on, and leaves its exit code in STATUS. The code in the run's
# exit_status.json replaces the launcher's: torchrun flattens codes to 1. srun reports the highest, which may be that of a
# rank that was killed because another one had failed.
supervise() {
  local launcher=$1 child='' signal='' passed='' interrupts=0 guard own folder before
  # Another run may own the directory, so nothing in it is removed; this one also writes its status to a file of its own.
  before=$(status_mark)
  # Ranks in a container see the run's directory, but not this machine's /tmp.
  folder=$(mktemp -d ${CONTAINER:+"--tmpdir=$RUN"}) || folder=
  export MEGAVL_EXIT_STATUS=${folder:+$folder/exit_status.json}
  trap 'signal=USR1; pass_on' USR1
  trap 'signal=TERM; pass_on' TERM HUP
  trap 'signal=INT; interrupts=$((interrupts + 1)); pass_on' INT
  # In a process group of its own the launcher does not also get the terminal's Ctrl-C.
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  end_leftovers >/dev/null 2>&1 &
  guard=$!
  [ -z "$signal" ] || pass_on
  while :; do
    signal='' STATUS=0
    wait "$child" || STATUS=$?
    [ -n "$signal" ] || break # a signal ends `wait` early
  done
  trap - USR1 TERM HUP INT
  kill "$guard" 2>/dev/null || :
  own=$(own_status)
  [ -z "$folder" ] || rm -rf "$folder"
  if [ "$STATUS" != 0 ]; then STATUS=${own:-$STATUS}; fi
  if [ "$interrupts" -gt 0 ] && [[ ${own:-75} = 75 ]]; then STATUS=130; fi
}

# The code that this run recorded, or nothing. A run that was refused its directory records it outside.
own_status() {
  local file=$RUN/exit_status.json
  if [ "$(status_mark)" = "$before" ]; then file=$MEGAVL_EXIT_STATUS; fi
  if [ -r "$file" ]; then sed -n 's/.*"code": *\([0-9][0-9]*\).*/\1/p' "$file"; fi
}

# Changes with every status that is written.
status_mark() { stat -c '%i %y' "$RUN/exit_status.json" 2>/dev/null || :; }

# The first signal is passed on, since torchrun leaves its ranks alone at a second one. A second Ctrl-C ends all at once.
pass_on() {
  [ -n "$child" ] || return 0
  if [ "$interrupts" -gt 1 ]; then
    end_ranks
  elif [ -z "$passed" ]; then
    passed=1
    # srun keeps Ctrl-C to itself.
    if [ "$launcher" = srun ] && [ "$signal" = INT ]; then signal=USR1; fi
    kill -s "$signal" "$child" 2>/dev/null || :
  fi
}

end_ranks() {
  local ranks=()
  if [ "$launcher" = srun ]; then
    scancel --signal=KILL "$SLURM_JOB_ID" || :
  else
    mapfile -d ' ' -t ranks < <(cat "/proc/$child/task"/*/children 2>/dev/null)
    [ "${#ranks[@]}" = 0 ] || kill -s KILL "${ranks[@]}" || :
  fi
}

# After a failure a rank that is stopped or stuck does not end, and the launcher would wait for it as for a long save.
end_leftovers() {
  while :; do
    sleep 1
    case $(own_status) in '' | 0 | 75 | 130) ;; *) break ;; esac
  done
  sleep 10
  end_ranks
}
