# Sourced by two_hosts.sh and two_hosts_slurm.sh: two "hosts", sdm-a (10.77.0.1) and sdm-b (10.77.0.2), made of network
# namespaces on this machine, and a small training to run on them. Needs root and iproute2 (Debian: apt-get install iproute2).
# Before it, `out` is the folder to write to; after it, `on a|b COMMAND` runs on a host, and `training` is the program's flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$out"
out=$(readlink -f "$out")
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

skip() { echo "skipped: $1"; exit 0; }
[ "$(id -u)" = 0 ] || skip "making network namespaces needs root"
command -v ip > /dev/null || skip "there is no ip command (apt-get install iproute2)"
ip netns add sdm-probe 2> /dev/null || skip "this root may not make network namespaces (a container?)"
ip netns delete sdm-probe

remove_hosts() {
  # Only what runs in these two namespaces, which are ours.
  for host in sdm-a sdm-b; do
    pids=$(ip netns pids "$host" 2> /dev/null || true)
    [ -z "$pids" ] || kill -9 $pids 2> /dev/null || true
    ip netns delete "$host" 2> /dev/null || true
  done
}
trap remove_hosts EXIT
remove_hosts
ip netns add sdm-a
ip netns add sdm-b
ip link add sdm-veth-a netns sdm-a type veth peer name sdm-veth-b netns sdm-b
ip -n sdm-a address add 10.77.0.1/24 dev sdm-veth-a
ip -n sdm-b address add 10.77.0.2/24 dev sdm-veth-b
for host in a b; do
  ip -n "sdm-$host" link set "sdm-veth-$host" up
  ip -n "sdm-$host" link set lo up
done
printf '127.0.0.1 localhost\n10.77.0.1 sdm-a\n10.77.0.2 sdm-b\n' > "$out/hosts"

# on a|b COMMAND: on that host, with a host name and a table of hosts of its own (ip netns exec makes the mounts private)
on() {
  local host=$1
  shift
  ip netns exec "sdm-$host" unshare --uts sh -c 'mount --bind "$1" /etc/hosts; hostname "$0"; shift; exec "$@"' \
    "sdm-$host" "$out/hosts" "$@"
}

wait_for() { # wait_for SECONDS COMMAND: until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    if ((SECONDS > end)); then echo "timed out: $*" >&2; return 1; fi
    sleep 0.2
  done
}

[ -e "$out/data/dataset.json" ] || python scripts/scenes/make_scenes.py --out "$out/data" --size 16 --train 16 --val 2
training="image_train.py --data_dir $out/data --dataset_mode custom --num_classes 9 --no_instance True --image_size 16
  --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 8 --num_head_channels 32
  --batch_size 2 --log_interval 2 --num_workers 0 --val_images 2"
