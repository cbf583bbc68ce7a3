#!/bin/sh
# Ray on the network on which the head has this name: start.sh head NAME, start.sh worker NAME.
# By itself Ray takes the address of the default route, which leads out of the house and not to the other machines.
set -eu
role=${1:?head or worker} head=${2:?the name of the head}
# no packet is sent: the system says which own address it would send from
own=$(python -c "
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.connect((sys.argv[1], 6379))
    print(s.getsockname()[0])" "$head")
case $role in
    head) exec ray start --head --node-ip-address="$own" --port=6379 --dashboard-host=0.0.0.0 --dashboard-port=8265 --num-cpus=0 --disable-usage-stats --block ;;
    worker) exec ray start --address="$head:6379" --node-ip-address="$own" --disable-usage-stats --block ;;
    *) echo "It is head or worker, not $role." >&2; exit 2 ;;
esac
