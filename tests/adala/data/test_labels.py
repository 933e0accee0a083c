import json
import pickle

import pytest

from adala.data.images import DecodeError
from adala.data.labels import MissingLabelError, read_classes, read_label, read_labels

CLASSES = ("ape", "bee", "sea lion")


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"cls": b"2"}, 2),
        ({"cls": b" 2 \r\n"}, 2),
        ({"cls": b"\xef\xbb\xbf2"}, 2),
        ({"cls": b"2.0"}, 2),
        ({"cls": b"bee"}, 1),
        ({"cls": b"sea lion\n"}, 2),
        ({"label": b"1"}, 1),
        ({"txt": b"bee"}, 1),
        ({"txt": b"a bee on a flower", "json": b'{"label": 0}'}, 0),
        ({"json": b'{"label": "ape"}'}, 0),
        ({"json": b'{"caption": "a bee", "class_id": 1}'}, 1),
        ({"json": b'{"label": null, "class": 2.0}'}, 2),
        ({"json": b"2"}, 2),
        ({"cls": b"0", "json": b'{"label": 2}'}, 0),
    ],
    ids=str,
)
def test_labels_of_many_hands(fields, label):
    assert read_label(fields, CLASSES) == label


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cls": b"-1"}, "'-1' is not one of 0, 1, 2"),
        ({"cls": b"1.5"}, "'1.5' is not one of 0, 1, 2"),
        ({"cls": b"1e30"}, "not one of"),
        ({"cls": b"nan"}, "'nan' is not among the 3 names"),
        ({"cls": b"cat"}, "'cat' is not among the 3 names"),
        ({"cls": b"1 2"}, "'1 2' is not among"),
        ({"cls": b""}, "its .cls is no label: it is empty"),
        ({"cls": b"\xff\xfe"}, "cannot be read"),
        ({"cls": b"-100"}, "'-100' is not one of 0, 1, 2"),
        ({"cls": b"+1"}, "not one of"),
        ({"cls": b"1e0"}, "'1e0' is not one of"),
        ({"cls": b"1_0"}, "'1_0' is not one of"),
        ({"cls": "\u0661".encode()}, "is not one of"),
        ({"cls": "\u20031".encode()}, "is not one of"),
        ({"cls": b"1\0"}, "is not among"),
        ({"cls": b"9223372036854775808"}, "is not one of"),
        ({"cls": b"1" * 10**4}, r"'1+\.\.\.1+' is not one of"),
        ({"cls": b"1".ljust(2**21)}, "its .cls of 2097152 bytes holds no label"),
        ({"json": b"[" * 10**5}, "its .json cannot be read: it is nested too deeply"),
        ({"json": b"[" * 900 + b"]" * 900}, "is neither a number nor a name"),
        ({"json": b"NaN"}, "nan is neither"),
        ({"json": b"1e400"}, "inf is not one of"),
        ({"json": b"-Infinity"}, "-inf is neither|-inf is not"),
        ({"json": b'{"label": -100}'}, "-100 is not one of"),
        ({"json": b"{"}, "its .json cannot be read"),
        ({"json": b'{"label": true}'}, "True is neither a number nor a name"),
        ({"json": b'{"label": [1]}'}, r"\[1\] is neither"),
    ],
    ids=str,
)
def test_what_is_no_class_is_a_bad_sample(fields, message):
    with pytest.raises(DecodeError, match=message) as caught:
        read_label(fields, CLASSES)
    assert not isinstance(caught.value, MissingLabelError)


@pytest.mark.parametrize("fields", [{}, {"png": b""}, {"txt": b"a caption"}, {"json": b'{"caption": "x"}'}], ids=str)
def test_a_caption_is_no_label(fields):
    with pytest.raises(MissingLabelError):
        read_label(fields, CLASSES)


def test_a_name_without_a_list_of_classes_says_what_is_missing():
    with pytest.raises(DecodeError, match=r"'bee' is a name: list the names of all classes in a classes\.json"):
        read_label({"cls": b"bee"})


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ('["ape", "bee"]', "classes.json"),
        ('{"bee": 1, "ape": 0}', "classes.json"),
        ('{"0": "ape", "1": "bee"}', "classes.json"),
        ('{"0": ["ape", "Pan"], "1": ["bee", "Apis"]}', "classes.json"),
        ("ape\nbee\n\n", "classes.txt"),
        ("ape\r\nbee", "/x/labels.txt"),
    ],
)
def test_lists_of_classes(text, address):
    assert read_classes(text, address) == ("ape", "bee")


def test_ten_and_more_numbers_are_in_the_order_of_numbers():
    names = tuple(f"class {number}" for number in range(12))
    assert read_classes(json.dumps({str(n): name for n, name in enumerate(names)}), "classes.json") == names


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("[]", "c.json"), ("{", "c.json"), ("3", "c.json"), ('["a", "a"]', "c.json"), ('["a", 3]', "c.json"),
        ('{"a": 0, "b": 2}', "c.json"), ('{"1": "a", "2": "b"}', "c.json"), ("", "c.txt"), ("a\n\nb", "c.txt"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_classes_is_refused_by_name(text, address):
    with pytest.raises(ValueError, match=address):
        read_classes(text, address)


@pytest.mark.parametrize("content", [b"-100", b"0 -1", b"1,+2", b"1_0", "0 \u0661".encode()])
def test_of_several_labels_each_is_a_number_of_digits_alone(content):
    with pytest.raises(DecodeError, match=r"its \.cls holds no labels"):
        read_labels({"cls": content})
    assert read_labels({"cls": b" 2, 0\n1 ,"}) == (0, 1, 2)


def test_digits_that_are_the_name_of_a_class_are_its_number():
    """Names count where a text is no number."""
    assert read_label({"cls": b"1e0"}, ("0", "1e0")) == 1


@pytest.mark.parametrize("field", ["pyd", "pickle", "pkl", "pth", "npy", "cbor", "mp"])
def test_what_could_be_code_or_a_tensor_is_never_read(field):
    class Sentinel:
        def __reduce__(self):
            return (pytest.fail, ("it was loaded",))

    with pytest.raises(MissingLabelError):
        read_label({field: pickle.dumps(Sentinel())})
    with pytest.raises(DecodeError, match="cannot be read"):
        read_label({"cls": pickle.dumps(Sentinel())})


def test_a_caption_in_another_coding_or_of_any_length_is_a_caption():
    for content in (b"\xff\xfe", b"3".ljust(2**21)):
        with pytest.raises(MissingLabelError):
            read_label({"txt": content})
