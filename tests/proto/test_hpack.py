"""HPACK: the examples of RFC 7541, appendix C, the rules that a decoder has to enforce, and the `hpack` package."""

from __future__ import annotations

import random
from itertools import pairwise

import hpack as peer
import pytest

from wherry.proto.grpc import hpack

Fields = list[tuple[str, str]]

FIRST: Fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")]
SECOND: Fields = [*FIRST, ("cache-control", "no-cache")]
THIRD: Fields = [
    (":method", "GET"),
    (":scheme", "https"),
    (":path", "/index.html"),
    (":authority", "www.example.com"),
    ("custom-key", "custom-value"),
]
DATE = "Mon, 21 Oct 2013 20:13:2{} GMT"
COOKIE = "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
SITE = ("location", "https://www.example.com")
ANSWER_1: Fields = [(":status", "302"), ("cache-control", "private"), ("date", DATE.format(1)), SITE]
ANSWER_2: Fields = [(":status", "307"), *ANSWER_1[1:]]
ANSWER_3: Fields = [
    (":status", "200"),
    ("cache-control", "private"),
    ("date", DATE.format(2)),
    SITE,
    ("content-encoding", "gzip"),
    ("set-cookie", COOKIE),
]
TABLE_OF_256 = "3fe101"  # the answers of C.5 and C.6 are for a table of 256 bytes

EXAMPLES: dict[str, list[tuple[str, Fields, int]]] = {
    "C.2.1": [("400a637573746f6d2d6b65790d637573746f6d2d686561646572", [("custom-key", "custom-header")], 55)],
    "C.2.2": [("040c2f73616d706c652f70617468", [(":path", "/sample/path")], 0)],
    "C.2.3": [("100870617373776f726406736563726574", [("password", "secret")], 0)],
    "C.2.4": [("82", [(":method", "GET")], 0)],
    "C.3": [
        ("828684410f7777772e6578616d706c652e636f6d", FIRST, 57),
        ("828684be58086e6f2d6361636865", SECOND, 110),
        ("828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565", THIRD, 164),
    ],
    "C.4": [
        ("828684418cf1e3c2e5f23a6ba0ab90f4ff", FIRST, 57),
        ("828684be5886a8eb10649cbf", SECOND, 110),
        ("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf", THIRD, 164),
    ],
    "C.5": [
        (
            (
                TABLE_OF_256
                + "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54"
                "6e1768747470733a2f2f7777772e6578616d706c652e636f6d"
            ),
            ANSWER_1,
            222,
        ),
        ("4803333037c1c0bf", ANSWER_2, 222),
        (
            (
                "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48"
                "514b425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31"
            ),
            ANSWER_3,
            215,
        ),
    ],
    "C.6": [
        (
            (
                TABLE_OF_256 + "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff"
                "6e919d29ad171863c78f0b97c8e9ae82ae43d3"
            ),
            ANSWER_1,
            222,
        ),
        ("4883640effc1c0bf", ANSWER_2, 222),
        (
            (
                "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af"
                "27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007"
            ),
            ANSWER_3,
            215,
        ),
    ],
}


@pytest.mark.parametrize("section", EXAMPLES)
def test_the_examples_of_rfc_7541(section: str) -> None:
    decoder = hpack.Decoder()
    for block, fields, size in EXAMPLES[section]:
        assert decoder.decode(bytes.fromhex(block)) == fields
        assert decoder._size == size


@pytest.mark.parametrize(("block", "mask", "value"), [("0a", 0x1F, 10), ("1f9a0a", 0x1F, 1337), ("2a", 0xFF, 42)])
def test_integers_of_appendix_c_1(block: str, mask: int, value: int) -> None:
    assert hpack._integer(bytes.fromhex(block), 0, mask) == (value, len(block) // 2)


def by_the_peer(decoder: peer.Decoder, block: bytes) -> Fields:
    return [
        (bytes(name).decode("latin-1"), bytes(value).decode("latin-1"))
        for name, value in decoder.decode(block, raw=True)
    ]


# -- Huffman


def huffman_encode(data: bytes) -> bytes:
    codes = {
        symbol: (first + at, length) for length, first, symbols in hpack._CODES for at, symbol in enumerate(symbols)
    }
    bits = "".join(f"{codes[byte][0]:0{codes[byte][1]}b}" for byte in data)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big") if bits else b""


def test_every_byte_has_the_code_that_the_peer_gives_it() -> None:
    for byte in range(256):
        encoded = peer.huffman.HuffmanEncoder(
            peer.huffman_constants.REQUEST_CODES, peer.huffman_constants.REQUEST_CODES_LENGTH
        ).encode(bytes([byte]))
        assert hpack.huffman_decode(encoded) == bytes([byte])
        assert huffman_encode(bytes([byte])) == encoded


def test_huffman_there_and_back() -> None:
    chance = random.Random(7)
    for _ in range(300):
        data = chance.randbytes(chance.randrange(40))
        assert hpack.huffman_decode(huffman_encode(data)) == data


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("ff", "8 bits of padding"),
        ("1fff", "padding longer than 7 bits behind a symbol"),
        ("18", "padding of zeros"),
        ("fffffffc", "EOS"),
        ("ffffffff", "EOS and padding"),
        ("f8ffffffff", "EOS behind a symbol"),
    ],
)
def test_huffman_is_strict(data: str, why: str) -> None:
    with pytest.raises(hpack.HpackError):
        hpack.huffman_decode(bytes.fromhex(data))


# -- rules


def test_what_is_encoded_is_decoded() -> None:
    fields = [("grpc-status", "5"), ("grpc-message", "x" * 5000), ("a", "")]
    assert hpack.Decoder().decode(hpack.encode(fields)) == fields
    assert by_the_peer(peer.Decoder(), hpack.encode(fields)) == fields


@pytest.mark.parametrize(
    "block",
    [
        "80",  # index 0
        "be",  # an entry that isn't there
        "ff80808008",  # the same, far away
        "40",  # no name
        "4085",  # a name that ends behind the block
        "408825a849",
        "3fffffff7f",  # a table larger than was allowed
        "3fe21f",  # by one byte
        "8220",  # a size update behind a field
        "823f01",
        "ffffffffffff0f",  # an integer that doesn't end
        "3f8080808080808000",
        "0001",
        "00818100",
        "00ff",
    ],
)
def test_blocks_that_are_none(block: str) -> None:
    with pytest.raises(hpack.HpackError):
        hpack.Decoder().decode(bytes.fromhex(block))


@pytest.mark.parametrize(
    "field",
    [("Upper", "x"), ("", "x"), ("a b", "x"), ("a\0", "x"), ("::path", "x"), ("a", "x\r\ny"), ("a", "\0"), ("ä", "x")],
)
def test_fields_that_http_2_forbids(field: tuple[str, str]) -> None:
    with pytest.raises(hpack.Malformed):
        hpack.Decoder().decode(hpack.encode([field]))


def test_an_entry_larger_than_the_table_empties_it() -> None:
    decoder = hpack.Decoder()
    decoder.decode(bytes.fromhex(EXAMPLES["C.3"][0][0]))
    large = b"\x40\x01a\x7f" + b"\x81\x1f" + b"x" * 4096  # a literal for the table: 4096 bytes and its overhead
    assert decoder.decode(large) == [("a", "x" * 4096)]
    assert (decoder._size, len(decoder._dynamic)) == (0, 0)
    with pytest.raises(hpack.HpackError):
        decoder.decode(b"\xbe")


def test_a_table_that_shrinks_and_grows() -> None:
    decoder = hpack.Decoder()
    decoder.decode(bytes.fromhex(EXAMPLES["C.3"][0][0]))
    assert decoder.decode(b"\x20\x3f\xe1\x1f\x82") == [(":method", "GET")]
    assert decoder._size == 0
    assert decoder._limit == 4096


def test_a_header_list_that_is_too_large_is_refused_before_it_is_made() -> None:
    decoder = hpack.Decoder()
    decoder.decode(b"\x40\x01a\x7f" + b"\x81\x1e" + b"x" * 3968)
    bomb = b"\xbe" * 60_000  # 60 kB that name 240 MB
    with pytest.raises(hpack.ListTooLarge):
        decoder.decode(bomb)


def test_long_strings_are_not_kept() -> None:
    decoder = hpack.Decoder()
    for number in range(600):
        for size in (4, 4000):
            value = huffman_encode(f"{number}".encode() + b"0" * size)
            block = b"\x00\x01a" + bytes(hpack._length(len(value)))
            decoder.decode(block[:3] + bytes([block[3] | 0x80]) + block[4:] + value)
    assert len(decoder._strings) <= hpack._CACHE_LIMIT
    assert sum(map(len, decoder._strings)) <= hpack._CACHE_LIMIT * hpack._CACHED_STRING


# -- beside the peer


def some_fields(chance: random.Random) -> Fields:
    names = [":path", "te", "user-agent", "containerd-namespace", "x-trace", "grpc-timeout"]
    values = ["", "trailers", "default", "/containerd.services.tasks.v1.Tasks/Create", "99999u", "x" * 300]
    values += ["".join(map(chr, chance.choices(range(0x20, 0x7F), k=chance.randrange(30)))) for _ in range(3)]
    return [(chance.choice(names), chance.choice(values)) for _ in range(chance.randrange(12))]


def test_what_the_peer_encodes_is_decoded_over_many_blocks_of_one_connection() -> None:
    chance = random.Random(3)
    encoder, decoder = peer.Encoder(), hpack.Decoder()
    for _ in range(400):
        if chance.random() < 0.1:
            encoder.header_table_size = chance.choice([0, 60, 300, 4096])
        fields = some_fields(chance)
        block = encoder.encode(fields, huffman=chance.random() < 0.7)
        assert decoder.decode(block) == fields


def test_mutated_blocks_mean_the_same_to_the_peer_or_nothing() -> None:
    chance = random.Random(4)
    agreed = refused = 0
    for _ in range(4000):
        encoder = peer.Encoder()
        blocks = [bytearray(encoder.encode(some_fields(chance), huffman=chance.random() < 0.5)) for _ in range(2)]
        if blocks[1]:
            blocks[1][chance.randrange(len(blocks[1]))] = chance.randrange(256)
        ours, theirs = hpack.Decoder(), peer.Decoder()
        assert ours.decode(bytes(blocks[0])) == by_the_peer(theirs, bytes(blocks[0]))
        try:
            found = ours.decode(bytes(blocks[1]))
        except hpack.HpackError:
            refused += 1
            continue
        assert found == by_the_peer(theirs, bytes(blocks[1]))
        agreed += 1
    assert agreed > 500
    assert refused > 500


def test_random_blocks_raise_nothing_else() -> None:
    chance = random.Random(8)
    for _ in range(3000):
        try:
            hpack.Decoder().decode(chance.randbytes(chance.randrange(1, 60)))
        except hpack.HpackError:
            continue


def test_the_code_is_a_prefix_code_that_is_full() -> None:
    lengths = [length for length, _, _ in hpack._CODES]
    assert all(before < after for before, after in pairwise(lengths))
    assert sum(len(symbols) << (30 - length) for length, _, symbols in hpack._CODES) == 1 << 30
