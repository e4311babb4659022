#!/usr/bin/env bash
# Trains across two "hosts" made of network namespaces on this machine: 1 + 1 ranks by torchrun, then by mpiexec.
# Needs root and iproute2 (Debian: apt-get install iproute2); without them it says so and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-OUTPUT/two_hosts}

skip() { echo "skipped: $1"; exit 0; }
[ "$(id -u)" = 0 ] || skip "making network namespaces needs root"
command -v ip > /dev/null || skip "there is no ip command (apt-get install iproute2)"
ip netns add sdm-probe 2> /dev/null || skip "this root may not make network namespaces (a container?)"
ip netns delete sdm-probe

cleanup() {
  # Only what runs in these two namespaces, which are ours.
  for host in sdm-a sdm-b; do
    pids=$(ip netns pids "$host" 2> /dev/null || true)
    [ -z "$pids" ] || kill -9 $pids 2> /dev/null || true
    ip netns delete "$host" 2> /dev/null || true
  done
}
trap cleanup EXIT
cleanup
ip netns add sdm-a
ip netns add sdm-b
ip link add sdm-veth-a netns sdm-a type veth peer name sdm-veth-b netns sdm-b
ip -n sdm-a address add 10.77.0.1/24 dev sdm-veth-a
ip -n sdm-b address add 10.77.0.2/24 dev sdm-veth-b
for host in a b; do
  ip -n "sdm-$host" link set "sdm-veth-$host" up
  ip -n "sdm-$host" link set lo up
done

# on a|b COMMAND: on that host, with a host name of its own
on() { local host=$1; shift; ip netns exec "sdm-$host" unshare --uts sh -c 'hostname "$0"; exec "$@"' "sdm-$host" "$@"; }

[ -e "$out/data/dataset.json" ] || python scripts/make_scenes.py --out "$out/data" --size 16 --train 16 --val 2
training="image_train.py --data_dir $out/data --dataset_mode custom --num_classes 9 --no_instance True --image_size 16
  --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 8 --num_head_channels 32
  --batch_size 2 --max_steps 4 --save_interval 4 --log_interval 2 --num_workers 0 --val_images 2"
export OMP_NUM_THREADS=1
check() { grep -q "2 processes (started by $1)" "$2/log.txt" && grep -q "^.*done: 4 steps" "$2/log.txt" && echo "$1 across two hosts: 4 steps, saved in $2"; }

rm -rf "$out/torchrun" "$out/mpiexec"
elastic="python -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29511"
on b $elastic --node-rank 1 $training --logdir "$out/torchrun" > "$out/torchrun-b.log" 2>&1 &
on a $elastic --node-rank 0 $training --logdir "$out/torchrun" > "$out/torchrun-a.log" 2>&1 || { tail "$out"/torchrun-*.log; exit 1; }
wait
check torchrun "$out/torchrun"

# The same when the second host vanishes: the first must end within a minute, and say why.
rm -rf "$out/vanishing"
endless=${training/--max_steps 4/--max_steps 0}
on b $elastic --node-rank 1 $endless --logdir "$out/vanishing" > "$out/vanishing-b.log" 2>&1 &
on a $elastic --node-rank 0 $endless --logdir "$out/vanishing" > "$out/vanishing-a.log" 2>&1 &
first=$!
for _ in $(seq 600); do [ -s "$out/vanishing/progress.jsonl" ] && break; sleep 0.2; done
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
cat > "$launcher" <<'END'
#!/usr/bin/env bash
# Called as ssh would be: [-x] HOST COMMAND...
while [[ $1 == -* ]]; do shift; done
case $1 in 10.77.0.1) host=sdm-a ;; 10.77.0.2) host=sdm-b ;; esac
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; exec $*"
END
chmod +x "$launcher"
on a mpiexec -launcher ssh -launcher-exec "$(readlink -f "$launcher")" -localhost 10.77.0.1 -iface sdm-veth-a \
  -hosts 10.77.0.1,10.77.0.2 -ppn 1 -n 2 python $training --logdir "$out/mpiexec" > "$out/mpiexec.log" 2>&1 ||
  { tail "$out/mpiexec.log"; exit 1; }
check mpiexec "$out/mpiexec"
