# Sourced on each machine of aws.yaml and gcp.yaml, with the cluster's name: PATH, and what Ray has to see of its keys.
export PATH="$HOME/venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
TRUEWEIGHT_ADDRESS=$(hostname -I | cut -d' ' -f1)
export TRUEWEIGHT_ADDRESS
keys="$HOME/.trueweight/ray.env"
[ -s "$keys" ] || (umask 077 && "$HOME/venv/bin/trueweight" cluster keys "$1" --here "$TRUEWEIGHT_ADDRESS" >"$keys")
. "$keys"
unset keys
