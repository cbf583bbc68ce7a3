#!/bin/sh
# Run a command on a copy of this machine that is thrown away afterwards: sandbox.sh COMMAND...
# (an overlay over /, in a mount and process namespace of its own; needs root)
set -eu
where=$(mktemp -d)
trap 'rmdir "$where"' EXIT
# shellcheck disable=SC2016  # the inner shell expands them
unshare --mount --pid --uts --fork --propagation private sh -c '
    set -eu
    where=$1; shift
    mount -t tmpfs -o size=4g sandbox "$where"
    mkdir "$where/upper" "$where/work" "$where/root"
    mount -t overlay sandbox -o "lowerdir=/,upperdir=$where/upper,workdir=$where/work" "$where/root"
    mount -t proc proc "$where/root/proc"
    mount --rbind /dev "$where/root/dev"
    mount -t tmpfs run "$where/root/run"
    # no service starts when a package is installed
    printf "#!/bin/sh\nexit 101\n" > "$where/root/usr/sbin/policy-rc.d"
    chmod 0755 "$where/root/usr/sbin/policy-rc.d"
    exec chroot "$where/root" /usr/bin/env --chdir="$PWD" "$@"
' sh "$where" "$@"
