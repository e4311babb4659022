#!/usr/bin/env bash
# A SLURM of two "hosts" (network namespaces on this machine), and what a job there meets: srun, mpiexec in an allocation,
# the time limit and a requeue, scancel, a suspension, a rank that is killed. Some six minutes.
# Needs root, iproute2 and SLURM with munge (Debian: apt-get install iproute2 slurm-wlm munge); without them it says so and
# does nothing.
out=${1:-OUTPUT/two_hosts_slurm}
source "$(dirname "$0")/network_hosts.sh"
for program in munged slurmctld slurmd srun; do
  command -v "$program" > /dev/null || skip "there is no $program (apt-get install slurm-wlm munge)"
done

cluster=$(mktemp -d) # a socket's path must be short
remove_cluster() {
  remove_hosts
  [ ! -e "$cluster/munged.pid" ] || kill "$(cat "$cluster/munged.pid")" 2> /dev/null || true
  cp "$cluster"/*.log "$out" 2> /dev/null || true
  rm -rf "$cluster"
}
trap remove_cluster EXIT
chmod 755 "$cluster"
mkdir "$cluster/state"
head -c 1024 /dev/urandom > "$cluster/munge.key"
chmod 600 "$cluster/munge.key"
export SLURM_CONF=$cluster/slurm.conf
cat > "$SLURM_CONF" <<INNER
ClusterName=sdm
SlurmctldHost=sdm-a(10.77.0.1)
AuthType=auth/munge
AuthInfo=socket=$cluster/munge.sock
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool-%n
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd-%n.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd-%n.log
NodeName=sdm-a NodeAddr=10.77.0.1 CPUs=2 State=UNKNOWN
NodeName=sdm-b NodeAddr=10.77.0.2 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=sdm-a,sdm-b Default=YES MaxTime=INFINITE State=UP
INNER
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$cluster/cgroup.conf" # never used, but slurmd asks for one
munged --force --socket="$cluster/munge.sock" --key-file="$cluster/munge.key" --log-file="$cluster/munged.log" \
  --pid-file="$cluster/munged.pid" --seed-file="$cluster/munged.seed"
on a slurmctld
for host in a b; do
  mkdir "$cluster/spool-sdm-$host"
  on "$host" slurmd -N "sdm-$host"
done
in_state() { [ "$(on a squeue -h -j "$2" -o %T 2> /dev/null)" = "$1" ]; } # in_state STATE JOB
ended() { ! on a squeue -h -j "$1" 2> /dev/null | grep -q .; }
both_idle() { [ "$(on a sinfo -h -t idle -o %D)" = 2 ]; }
wait_for 60 both_idle
on a sinfo --version

# said PATTERN FILE WHAT: the file has such a line, else the end of all
said() {
  grep -qE "$1" "$2" || { echo "not so: $3" >&2; tail -n 20 "$2" >&2; exit 1; }
  echo "$3"
}
rm -rf "$out"/run-* "$out"/*.hosts
training=$(echo $training) # one line: it goes into a job's script
printf '#!/bin/sh\nhostname >> "$1"\nshift\nexec "$@"\n' > "$out/note-host"
chmod +x "$out/note-host"
for job in srun mpiexec pmi2; do
  log=$out/$job.log launcher=$job ranks=4
  steps="$out/note-host $out/$job.hosts python $training --max_steps 4 --save_interval 4 --logdir $out/run-$job"
  case $job in
    srun) command="srun --nodes 2 --ntasks 4 $steps" ;;
    mpiexec) command="salloc --nodes 2 --ntasks-per-node 1 mpiexec -n 2 $steps" ranks=2 ;;
    pmi2) command="srun --mpi pmi2 --nodes 2 --ntasks 2 $steps" ranks=2 launcher='(mpiexec|srun)' ;;
  esac
  if [ "$job" != srun ] && ! { command -v mpiexec > /dev/null && python -c "from mpi4py import MPI" 2> /dev/null; }; then
    echo "skipped: $job: no MPI library for mpi4py"
    continue
  fi
  on a timeout 120 $command > "$log" 2>&1 || { tail "$log"; exit 1; }
  grep -q "done: 4 steps" "$log" || { tail "$log"; exit 1; }
  [ "$(sort -u "$out/$job.hosts" | xargs)" = "sdm-a sdm-b" ] || { echo "$job: not on both hosts" >&2; exit 1; }
  said "^$ranks processes \(started by $launcher\)" "$log" "$job: $ranks ranks on two hosts, 4 steps"
done

# The job of docs/cluster.md: a signal before the time limit, and again from where it was.
cat > "$out/job.sh" <<INNER
#!/bin/bash
#SBATCH --nodes 2 --ntasks-per-node 1 --time 2 --signal USR1@60 --requeue --open-mode append --output $out/job.log
srun python $training --max_steps 100000 --save_interval 100000 --logdir $out/run-job
status=\$?
echo "status \$status"
if [ \$status = 75 ]; then scontrol requeue \$SLURM_JOB_ID; fi
INNER
rm -f "$out/job.log"
log=$out/job.log
job=$(on a sbatch --parsable "$out/job.sh")
wait_for 150 grep -qs "^status" "$log"
said "stopped by SIGUSR1 at step [0-9]+; all is saved" "$log" "time limit: saved before it"
said "^status 75" "$log" "time limit: exit status 75"
wait_for 60 in_state PENDING "$job"
wait_for 180 in_state RUNNING "$job" # SLURM lets a requeued job wait
continuing() { [ "$(grep -c "continuing this log directory's run at step" "$log")" = "$1" ]; }
wait_for 60 continuing 1
said "continuing this log directory's run at step" "$log" "requeued: went on"

moved() { [ "$(wc -l < "$out/run-job/progress.jsonl")" -gt "$1" ]; } # more lines than before
lines() { wc -l < "$out/run-job/progress.jsonl"; }
wait_for 60 moved "$(lines)"
on a scontrol suspend "$job"
sleep 75 # longer than a silent rank is waited for
before=$(lines)
on a scontrol resume "$job"
wait_for 30 moved "$before"
echo "suspended for 75 s: goes on"

on a scancel "$job"
wait_for 60 ended "$job"
said "stopped by SIGTERM at step [0-9]+; all is saved" "$log" "scancel: saved"

job=$(on a sbatch --parsable --time 10 --signal USR1@60 "$out/job.sh")
wait_for 60 in_state RUNNING "$job"
wait_for 60 continuing 2
wait_for 60 moved "$(lines)"
pids=$(ip netns pids sdm-b)
for pid in $pids; do
  if tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q "python image_train"; then kill -9 "$pid"; fi
done
since=$SECONDS
wait_for 75 ended "$job"
said "ending, because rank 1 \(host sdm-b\)" "$log" "a killed rank: the job ended after $((SECONDS - since)) s, and names it"
