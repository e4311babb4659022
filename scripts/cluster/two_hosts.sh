#!/usr/bin/env bash
# Trains across two "hosts" made of network namespaces on this machine: 1 + 1 ranks by torchrun, then by mpiexec.
# Needs root and iproute2 (Debian: apt-get install iproute2); without them it says so and does nothing.
out=${1:-OUTPUT/two_hosts}
source "$(dirname "$0")/network_hosts.sh"
four_steps="$training --max_steps 4 --save_interval 4"

check() { grep -q "2 processes (started by $1)" "$2/log.txt" && grep -q "^.*done: 4 steps" "$2/log.txt" && echo "$1 across two hosts: 4 steps, saved in $2"; }

rm -rf "$out/torchrun" "$out/mpiexec"
elastic="python -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29511"
on b $elastic --node-rank 1 $four_steps --logdir "$out/torchrun" > "$out/torchrun-b.log" 2>&1 &
on a $elastic --node-rank 0 $four_steps --logdir "$out/torchrun" > "$out/torchrun-a.log" 2>&1 || { tail "$out"/torchrun-*.log; exit 1; }
wait
check torchrun "$out/torchrun"

# The same when the second host vanishes: the first must end within a minute, and say why.
rm -rf "$out/vanishing"
on b $elastic --node-rank 1 $training --logdir "$out/vanishing" > "$out/vanishing-b.log" 2>&1 &
on a $elastic --node-rank 0 $training --logdir "$out/vanishing" > "$out/vanishing-a.log" 2>&1 &
first=$!
wait_for 120 test -s "$out/vanishing/progress.jsonl"
ip -n sdm-b link set sdm-veth-b down
since=$SECONDS
wait "$first" && { echo "the first host ended as if nothing had happened"; exit 1; }
grep -h "ending, because" "$out/vanishing-a.log" || { tail "$out/vanishing-a.log"; exit 1; }
echo "a vanished host: the other ended after $((SECONDS - since)) s"
[ $((SECONDS - since)) -le 75 ] # a minute, and what torchrun itself takes
kill -9 $(ip netns pids sdm-b) 2> /dev/null || true
wait
ip -n sdm-b link set sdm-veth-b up

# MPICH's mpiexec starts its proxies by a command of ours in place of ssh: HOST COMMAND...
python -c "from mpi4py import MPI" 2> /dev/null && command -v mpiexec > /dev/null || skip "mpiexec: no MPI library for mpi4py"
launcher=$out/launch-on-host
cat > "$launcher" <<'INNER'
#!/usr/bin/env bash
# Called as ssh would be: [-x] HOST COMMAND...
while [[ $1 == -* ]]; do shift; done
case $1 in 10.77.0.1) host=sdm-a ;; 10.77.0.2) host=sdm-b ;; esac
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; exec $*"
INNER
chmod +x "$launcher"
on a mpiexec -launcher ssh -launcher-exec "$launcher" -localhost 10.77.0.1 -iface sdm-veth-a \
  -hosts 10.77.0.1,10.77.0.2 -ppn 1 -n 2 python $four_steps --logdir "$out/mpiexec" > "$out/mpiexec.log" 2>&1 ||
  { tail "$out/mpiexec.log"; exit 1; }
check mpiexec "$out/mpiexec"
