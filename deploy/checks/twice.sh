#!/bin/sh
# Inside sandbox.sh: the role base in check mode, for real, and again; the last run must change nothing.
set -eu
cd "$(dirname "$0")/../ansible"
export PATH="$PWD/../../.venv-deploy/bin:$PATH" ANSIBLE_LOCAL_TEMP=/tmp/ansible ANSIBLE_HOME=/tmp/ansible ANSIBLE_NOCOLOR=1 ANSIBLE_BECOME=false
cat > /tmp/inventory.yml <<'YAML'
all:
  hosts:
    localhost:
      ansible_connection: local
  vars:
    ansible_python_interpreter: /usr/bin/python3
    base_operators: [{name: dr-who, key: ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFake someone}]
    base_logs_host: 127.0.0.1
    base_logs_password_file: /tmp/logs-password
YAML
printf '%s' an-invented-word-of-24 > /tmp/logs-password
play() { ansible-playbook --inventory /tmp/inventory.yml --limit localhost "$@" site.yml; }
echo "== check"; play --check
echo "== first"; play
echo "== second"; play
# what was written means something to the programs that read it
mkdir -p /run/sshd && sshd -t && nft -c -f /etc/nftables.conf && rsyslogd -N1 && id dr-who
echo "== done"
