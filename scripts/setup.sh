# Sourced by scripts/run and scripts/test: gets Debian packages and a virtual environment, only where they are missing.
# Speaks on stderr, and only when it installs something.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=${QCOWFUSE_VENV:-$repository/.venv}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # where a plain user's PATH may lack mke2fs and the like

say() { echo "${0##*/}: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

# Run a command silently; when it fails, show what it said.
quietly() {
    local log
    log=$(mktemp)
    if "$@" >"$log" 2>&1 </dev/null; then
        rm -f "$log"
        return 0
    fi
    tail -n 40 "$log" >&2
    rm -f "$log"
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# install_packages [-o APT-OPTION]... -- PACKAGE...
install_packages() {
    local options=()
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    command -v apt-get >/dev/null || fail "there is no apt-get here; install what these Debian packages hold: $*"
    say "installing Debian packages: $*"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "installing packages needs root: run this as root once, or install sudo"
        sudo -v || fail "installing packages needs root" # asks for the password here, where the terminal can be seen
    fi
    if [ -z "${package_lists_are_fresh:-}" ]; then
        quietly as_root apt-get -q update || say "apt-get update failed; going on with the lists that are here"
        package_lists_are_fresh=yes
    fi
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends "${options[@]}" install "$@" ||
        fail "apt-get could not install: $*"
}

# The first Python of 3.11 or later, by its absolute path.
find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if command -v "$name" >/dev/null 2>&1; then
            "$name" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.executable)' 2>/dev/null && return
        fi
    done
    return 1
}

# What building pyfuse3 and making an environment needs and this machine lacks.
missing_build_packages() {
    local python include
    if python=$(find_python); then
        "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
        include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
        [ -e "$include/Python.h" ] || echo python3-dev
    else
        printf '%s\n' python3 python3-venv python3-dev
    fi
    command -v gcc >/dev/null || printf '%s\n' gcc libc6-dev
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists fuse3 2>/dev/null || echo libfuse3-dev
    command -v fusermount3 >/dev/null || echo fuse3
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
}

# ensure_environment [EXTRA]: the project, editable, with its dependencies in $environment.
ensure_environment() {
    local extra=${1:-} stamp wanted missing python
    stamp=$environment/installed${extra:+-$extra}
    wanted=$(cksum <"$repository/pyproject.toml")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$environment/bin/python" -c '' 2>/dev/null; then
        return
    fi
    [ -w "$repository" ] || fail "cannot write in $repository; copy it to where you may write"
    mapfile -t missing < <(missing_build_packages)
    [ ${#missing[@]} = 0 ] || install_packages -- "${missing[@]}"
    python=$(find_python) || fail "needs Python 3.11 or later, and this system has none to offer"
    say "installing qcowfuse${extra:+ and what its ${extra}s need} into $environment"
    if ! "$environment/bin/python" -c 'import pip' 2>/dev/null; then
        quietly "$python" -m venv --clear "$environment" || fail "could not make $environment"
    fi
    quietly "$environment/bin/python" -m pip --disable-pip-version-check install -q -e "$repository${extra:+[$extra]}" ||
        fail "pip could not install qcowfuse"
    echo "$wanted" | tee "$environment/installed" >"$stamp" # with an extra is more than without
}
