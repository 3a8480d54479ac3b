#!/bin/bash
# An emulated Arm Linux board: Debian's packages and PyPI's wheels under qemu's user-mode emulator. See docs/arm-board.md.
#   board.sh setup             make the board; does nothing where it is up to date. No root, no change outside its folder
#   board.sh setup32           add a 32-bit core to it
#   board.sh start CORE PORT   serve SSH on 127.0.0.1:PORT (root, user namespaces, Linux 6.7 or later); writes ssh_config
#   board.sh stop              end that
# Its folder is $EDGEPRESS_BOARD, else edgepress/board in the user's cache folder. $WHEELS says what is installed on it.
# Needs apt-get, dpkg-deb, gcc, python3 with pip, Debian's keyring, and the network.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
board=${EDGEPRESS_BOARD:-${EDGEPRESS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgepress}/board}
rootfs=$board/rootfs
suite=bookworm # its python3 is 3.11, its qemu 7.2
site=usr/local/lib/python3.11/dist-packages
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
# the dynamic qemu-user has TCG plugins, qemu-user-static has none
packages="python3-minimal libpython3-stdlib libstdc++6 libatomic1 dash coreutils dropbear-bin qemu-user:amd64"
wheels=${WHEELS:-$(grep -E '^(numpy|onnxruntime|ai-edge-litert)==' "$here/../../constraints.txt" | tr '\n' ' ')}

debian() { # ROOT ARCHITECTURE PACKAGES...: unpack packages with all that they need into a folder; nothing is installed
  local apt=$board/apt root=$1 architecture=$2
  shift 2
  rm -rf "$root" "$apt"
  mkdir -p "$root" "$apt"/{state/lists,cache/archives}/partial
  : > "$apt/status"
  echo "deb [signed-by=$keyring] $mirror $suite main" > "$apt/sources.list"
  cat > "$apt/apt.conf" <<C
APT::Architecture "$architecture"; APT::Architectures { "$architecture"; "amd64"; };
APT::Install-Recommends "false"; APT::Sandbox::User ""; Acquire::Languages "none";
Dir::State "$apt/state"; Dir::State::status "$apt/status"; Dir::Cache "$apt/cache";
Dir::Etc::SourceList "$apt/sources.list"; Dir::Etc::SourceParts "/dev/null"; Dir::Etc::Preferences "/dev/null"; Dir::Etc::PreferencesParts "/dev/null";
Debug::NoLocking "true";
C
  APT_CONFIG=$apt/apt.conf apt-get -qq update
  APT_CONFIG=$apt/apt.conf apt-get -qq install -y --download-only "$@" > "$board/apt.log"
  for file in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$file" "$root"; done
  rm -rf "$apt" "$root"/usr/share/{man,doc,locale,info}
  mkdir -p "$root/usr/lib/python3/dist-packages" # or the host's would be seen
}

furnish() { # what a login needs
  mkdir -p "$rootfs"/{root/.ssh,tmp,dev,proc,sys,board,pycache,run,etc/dropbear}
  chmod 700 "$rootfs"/root{,/.ssh}
  chmod 1777 "$rootfs/tmp"
  mv "$rootfs"/usr/bin/qemu-{aarch64,arm} "$rootfs/board/"
  rm -rf "$rootfs"/usr/bin/qemu-*
  [ -e "$rootfs/bin/sh" ] || ln -s dash "$rootfs/bin/sh"
  echo 'root:x:0:0:root:/root:/bin/boardsh' > "$rootfs/etc/passwd"
  echo 'root:x:0:' > "$rootfs/etc/group"
  echo /bin/boardsh > "$rootfs/etc/shells"
  # the SSH server clears the environment: the core is named again here
  printf '#!/bin/sh\nset -a\n. /board/env\nexec /bin/sh "$@"\n' > "$rootfs/bin/boardsh"
  chmod 755 "$rootfs/bin/boardsh"
}

install() { # FOLDER PLATFORM WHEELS...
  local into=$1 platform=$2
  shift 2
  rm -rf "$into"
  # shellcheck disable=SC2046
  "${PYTHON:-python3}" -m pip -q install --disable-pip-version-check --no-compile --target "$into" --only-binary=:all: \
    --implementation cp --python-version 3.11 $(printf -- "--platform manylinux_2_%s_$platform " 34 28 27 17) "$@" \
    > "$into.log" 2>&1 || { tail -3 "$into.log" >&2; return 1; }
}

setup() {
  [ "$(uname -sm)" = "Linux x86_64" ] || { echo "The emulated board needs Linux on x86-64." >&2; exit 1; }
  [ "$(cat "$board/made" 2> /dev/null)" = "$(recipe)" ] && return
  mkdir -p "$board"
  rm -f "$board/made"
  # shellcheck disable=SC2086
  install "$board/wheels" aarch64 $wheels & # while the packages are on their way
  # shellcheck disable=SC2086
  debian "$rootfs" arm64 $packages
  furnish
  wait $!
  mkdir -p "$rootfs/${site%/*}"
  mv "$board/wheels" "$rootfs/$site"
  gcc -O2 -shared -fPIC -o "$rootfs/board/instructions.so" "$here/instructions.c"
  "${PYTHON:-python3}" "$here/cores.py" "$board"
  recipe > "$board/made"
}
setup32() { # the only runtime with wheels for 32-bit Arm is tflite-runtime; numpy is Debian's
  local root=${rootfs}32
  setup
  [ "$(cat "$board/made32" 2> /dev/null)" = "$(recipe)" ] && return
  debian "$root" armhf python3-minimal libpython3-stdlib python3-numpy libstdc++6 libatomic1
  cp -a "$root"/usr/lib/arm-linux-gnueabihf/{blas,lapack}/* "$root/usr/lib/arm-linux-gnueabihf/"
  mkdir -p "$root/${site%/*}"
  install "$root/$site" armv7l --no-deps tflite-runtime==2.14.0
  recipe > "$board/made32"
}
recipe() { echo "$wheels"; cat "$here"/{board.sh,cores.py,instructions.c} | sha256sum; }

guest() { # run one of the board's programs
  local libraries=$rootfs/lib/x86_64-linux-gnu
  "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries:$rootfs/usr/lib/x86_64-linux-gnu" \
    "$rootfs/board/qemu-aarch64" -L "$rootfs" "$@"
}

start() {
  local core=$1 port=$2 process
  stop
  printf 'QEMU_CPU=%s\nPYTHONHASHSEED=0\nPYTHONPYCACHEPREFIX=/pycache\nOPENBLAS_NUM_THREADS=1\n' "${core/%max/max,sme=off}" \
    > "$rootfs/board/env"
  [ -e "$board/id" ] || ssh-keygen -q -t ed25519 -N '' -f "$board/id"
  cp "$board/id.pub" "$rootfs/root/.ssh/authorized_keys"
  local key=$rootfs/etc/dropbear/key
  [ -e "$key" ] || guest "$rootfs/usr/bin/dropbearkey" -t ed25519 -f "$key" > /dev/null 2>&1
  echo "[127.0.0.1]:$port $(guest "$rootfs/usr/bin/dropbearkey" -y -f "$key" | grep ^ssh-)" > "$board/known_hosts"
  printf 'IdentityFile "%s"\nIdentitiesOnly yes\nUserKnownHostsFile "%s"\nGlobalKnownHostsFile none\n' \
    "$board/id" "$board/known_hosts" > "$board/ssh_config"
  rm -f "$board/fifo"
  mkfifo "$board/fifo"
  setsid unshare --user --mount --pid --fork -- bash "$0" inside "$core" "$port" > "$board/board.log" 2>&1 &
  process=$!
  echo $process > "$board/pid"
  for _ in $(seq 200); do
    [ "$(readlink /proc/$process/ns/user)" != "$(readlink /proc/self/ns/user)" ] && break
    sleep 0.02
  done
  # with one identity only, the SSH server may not set its groups: that is why this takes root
  if echo '0 0 65536' > /proc/$process/uid_map && echo '0 0 65536' > /proc/$process/gid_map; then
    echo go > "$board/fifo"
    for _ in $(seq 100); do
      (exec 3<> /dev/tcp/127.0.0.1/"$port") 2> /dev/null && return
      kill -0 $process 2> /dev/null || break
      sleep 0.1
    done
  fi
  cat "$board/board.log" >&2
  stop
  return 1
}

inside() { # in user, mount and process namespaces of its own, which end with it
  read -r _ < "$board/fifo"
  local tree=$board/roots/$1
  mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
  printf '%s' ':board:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/board/qemu-aarch64:OC' \
    > /proc/sys/fs/binfmt_misc/register
  mount --bind "$rootfs" "$rootfs"
  cd "$rootfs"
  mount -t proc proc proc
  mount --bind "$tree/proc/cpuinfo" proc/cpuinfo
  mount --bind "$tree/sys" sys
  mount --rbind /dev dev
  exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root chroot . \
    /usr/sbin/dropbear -F -E -s -j -k -p 127.0.0.1:"$2" -r /etc/dropbear/key -P /run/dropbear.pid
}

stop() {
  [ -e "$board/pid" ] || return 0
  local process first
  process=$(cat "$board/pid")
  # all processes of a process namespace end with its first, the only child; it is the last of them, and keeps its socket until then
  if grep -qs inside "/proc/$process/cmdline"; then
    first=$(cat "/proc/$process/task/$process/children")
    # shellcheck disable=SC2086
    kill -KILL $first "$process" 2> /dev/null || true
    for process in $first; do
      for _ in $(seq 300); do
        grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$process/status" || break
        sleep 0.1
      done
    done
  fi
  rm -f "$board/pid" "$board/fifo"
}

case ${1:-} in
  setup | setup32 | stop) "$1" ;;
  start | inside) "$1" "$2" "$3" ;;
  *) sed -n 2,8p "$0" >&2; exit 2 ;;
esac
