#!/usr/bin/env bash
# Trains on several hosts. Start it on each, with all hosts in the same order and the number of this one, from 0:
#
#   host0$ docs/launch/two_hosts.sh 0 host0:12345 host1:12345 -- pretrain experiments/cxr/moco.toml --out /shared/moco
#   host1$ docs/launch/two_hosts.sh 1 host0:12345 host1:12345 -- pretrain experiments/cxr/moco.toml --out /shared/moco
#
# What stands after `--` is a command of cxr-tf, `train` or `pretrain`. --out must be on a disk that all hosts share,
# and each port free and reachable from the other hosts. Given again on all hosts, it goes on where it was stopped.
set -euo pipefail

index=$1
shift
hosts=()
while [[ $# -gt 0 && $1 != -- ]]; do
  hosts+=("\"$1\"")
  shift
done
[[ $# -gt 1 ]] || { echo "usage: $0 INDEX HOST:PORT HOST:PORT... -- train|pretrain EXPERIMENT.toml ..." >&2; exit 2; }
shift

workers=$(IFS=,; echo "${hosts[*]}")
export TF_CONFIG="{\"cluster\": {\"worker\": [$workers]}, \"task\": {\"type\": \"worker\", \"index\": $index}}"
exec cxr-tf "$@"
