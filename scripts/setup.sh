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

# The line of a log that tells of a network that is not there, empty when there is none.
network_failure() {
    grep -m 1 -oE "(Temporary failure (resolving '[^']*'|in name resolution)|Could not (resolve|connect to) [^ ]*|\
Network is unreachable|Connection (refused|timed out)|Failed to establish a new connection)" "$1" | head -n 1
}

# install_failed LOG WHAT: end with one line where the network is to blame, else with what the log said last.
install_failed() {
    local reason
    if reason=$(network_failure "$1"); then
        rm -f "$1"
        fail "$2: $reason. Is this machine online?"
    fi
    tail -n 40 "$1" >&2
    rm -f "$1"
    fail "$2"
}

# need_root WHAT COMMAND: end with what an administrator has to run, unless root can be had. Asks for the password here,
# where the terminal can be seen.
need_root() {
    [ "$(id -u)" = 0 ] && return
    command -v sudo >/dev/null || fail "$1, which needs root, and there is no sudo here. As root, once: $2"
    sudo -v || fail "$1, which needs root. As root, once: $2"
}

# Fetch apt's lists, once. A mirror that fails matters only when a package is unknown.
update_package_lists() {
    [ -z "${package_lists_are_fresh:-}" ] || return 0
    package_lists_are_fresh=yes
    local log
    log=$(mktemp)
    if ! as_root env LC_ALL=C.UTF-8 apt-get -q -o APT::Update::Error-Mode=any update >"$log" 2>&1 </dev/null; then
        if lists_failed=$(network_failure "$log"); then
            say "apt-get update: $lists_failed; going on with the lists that are here"
            lists_failed+=". Is this machine online?"
        else
            lists_failed=$(grep -m 1 '^E:' "$log") || lists_failed="apt-get update failed"
            grep -A 2 -E '^(E|W|Err)' "$log" >&2 || true
            say "apt-get update failed; going on with the lists that are here"
        fi
    fi
    rm -f "$log"
}

# install_packages [-o APT-OPTION]... -- PACKAGE...
install_packages() {
    local options=() unknown log
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    command -v apt-get >/dev/null || fail "there is no apt-get here; install what these Debian packages hold: $*"
    need_root "needs the Debian packages $*" "apt-get update && apt-get install $*"
    say "installing Debian packages: $*"
    update_package_lists
    [ -z "${lists_failed:-}" ] || options+=(-o Acquire::Retries=0) # else it tries for a minute
    log=$(mktemp)
    if as_root env LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends "${options[@]}" \
        install "$@" >"$log" 2>&1 </dev/null; then
        rm -f "$log"
        return
    fi
    unknown=$(sed -nE "s/^E: (Unable to locate p|P)ackage '?([^' ]*).*/\2/p" "$log" | xargs)
    if [ -n "$unknown" ] && [ -n "${lists_failed:-}" ]; then
        rm -f "$log"
        fail "apt-get knows no package $unknown, and could not fetch its lists: $lists_failed"
    fi
    install_failed "$log" "apt-get could not install: $*"
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

# End, before anything is installed, where neither this system nor its packages have a Python that will do.
require_python() {
    local needed="needs Python 3.11 or later, as Debian 12 and 13 and Ubuntu 24.04 have it" candidate
    ! find_python >/dev/null || return 0
    [ ! -e /usr/bin/python3 ] || fail "$needed; here it is $(/usr/bin/python3 -V 2>&1)"
    # A user who cannot install packages is told of all of them by install_packages.
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; } || return 0
    need_root "needs the Debian package python3" "apt-get update && apt-get install python3"
    update_package_lists
    candidate=$(LC_ALL=C apt-cache policy python3 | awk '$1 == "Candidate:" && $2 != "(none)" {print $2}')
    [ -z "$candidate" ] || dpkg --compare-versions "$candidate" ge 3.11 || fail "$needed; apt has $candidate"
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

# ensure_environment EXTRA [PACKAGE]...: the project, editable, with its dependencies in $environment; and these Debian
# packages, asked for together with all others, so that an administrator is needed once.
ensure_environment() {
    local extra=$1 packages=("${@:2}") stamp wanted missing python log
    stamp=$environment/installed${extra:+-$extra}
    wanted=$(cksum <"$repository/pyproject.toml")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$environment/bin/python" -c '' 2>/dev/null; then
        [ ${#packages[@]} = 0 ] || install_packages -- "${packages[@]}"
        return
    fi
    [ -w "$repository" ] || fail "cannot write in $repository; copy it to where you may write"
    require_python
    mapfile -t missing < <(missing_build_packages)
    missing+=("${packages[@]}")
    [ ${#missing[@]} = 0 ] || install_packages -- "${missing[@]}"
    python=$(find_python) || fail "needs Python 3.11 or later, and this system has none to offer"
    say "installing qcowfuse${extra:+ and what its ${extra}s need} into $environment"
    if ! "$environment/bin/python" -c 'import pip' 2>/dev/null; then
        quietly "$python" -m venv --clear "$environment" || fail "could not make $environment"
    fi
    log=$(mktemp)
    editable=(-e "$repository${extra:+[$extra]}")
    "$environment/bin/python" -m pip --disable-pip-version-check install -q "${editable[@]}" \
        >"$log" 2>&1 </dev/null || install_failed "$log" "pip could not install qcowfuse"
    rm -f "$log"
    echo "$wanted" | tee "$environment/installed" >"$stamp" # with an extra is more than without
}
