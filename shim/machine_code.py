"""What a template does between two instructions of the interpreter, as machine code, with its assembly beside it.

Copying and mapping, and comparing and dropping, may have nothing between them that writes to memory; and marking some
hundred thousand objects one by one would take the interpreter longer than all else that the fork server does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Final

PAGE: Final = mmap.PAGESIZE
_ENTRY: Final = struct.Struct("=7q")
# one system call after the other: rdi points to entries of seven words (number, six arguments), rsi counts them; each
# result replaces its number
_BATCH: Final = bytes.fromhex(
    "53"  # push rbx
    "4154"  # push r12
    "4889fb"  # mov rbx, rdi
    "4989f4"  # mov r12, rsi
    "4d85e4"  # next: test r12, r12
    "7429"  # jz done
    "488b03"  # mov rax, [rbx]
    "488b7b08"  # mov rdi, [rbx+8]
    "488b7310"  # mov rsi, [rbx+16]
    "488b5318"  # mov rdx, [rbx+24]
    "4c8b5320"  # mov r10, [rbx+32]
    "4c8b4328"  # mov r8, [rbx+40]
    "4c8b4b30"  # mov r9, [rbx+48]
    "0f05"  # syscall
    "488903"  # mov [rbx], rax
    "4883c338"  # add rbx, 56
    "49ffcc"  # dec r12
    "ebd2"  # jmp next
    "415c"  # done: pop r12
    "5b"  # pop rbx
    "c3"  # ret
)
# rdi points to pairs (page, the file's page), rsi counts them; rdx is a bitmap of the file's words, less the address of
# the file's first page divided by 64. A page that equals the file's, but for words whose bits are set, is dropped with
# madvise(page, 4096, MADV_DONTNEED); returns how many were
_RELEASE: Final = bytes.fromhex(
    "53"  # push rbx
    "4154"  # push r12
    "4155"  # push r13
    "4156"  # push r14
    "4889fb"  # mov rbx, rdi
    "4989f4"  # mov r12, rsi
    "4989d6"  # mov r14, rdx
    "4531ed"  # xor r13d, r13d
    "fc"  # cld
    "4d85e4"  # next: test r12, r12
    "744e"  # je done
    "488b33"  # mov rsi, [rbx]
    "488b7b08"  # mov rdi, [rbx+8]
    "4889fa"  # mov rdx, rdi
    "48c1ea06"  # shr rdx, 6
    "4c01f2"  # add rdx, r14
    "b900020000"  # mov ecx, 512
    "f348a7"  # more: repe cmpsq
    "7413"  # je same
    "b8ff010000"  # mov eax, 511
    "4829c8"  # sub rax, rcx
    "480fa302"  # bt [rdx], rax
    "731c"  # jae differs
    "4885c9"  # test rcx, rcx
    "75e8"  # jne more
    "488b3b"  # same: mov rdi, [rbx]
    "be00100000"  # mov esi, 4096
    "ba04000000"  # mov edx, MADV_DONTNEED
    "b81c000000"  # mov eax, 28 (madvise)
    "0f05"  # syscall
    "49ffc5"  # inc r13
    "4883c310"  # differs: add rbx, 16
    "49ffcc"  # dec r12
    "ebad"  # jmp next
    "4c89e8"  # done: mov rax, r13
    "415e"  # pop r14
    "415d"  # pop r13
    "415c"  # pop r12
    "5b"  # pop rbx
    "c3"  # ret
)
# rdi points to addresses, rsi counts them; rdx is added to the word at each of them (r9 is 0) or stored in its low half
# (r9 is 1); where rcx isn't 0 the word's bit is set in the bitmap there, whose first bit is the word at r8
_MARK: Final = bytes.fromhex(
    "4885f6"  # test rsi, rsi
    "7428"  # je ended
    "488b07"  # again: mov rax, [rdi]
    "4d85c9"  # test r9, r9
    "7505"  # jne store
    "480110"  # add [rax], rdx
    "eb02"  # jmp mark
    "8910"  # store: mov dword [rax], edx
    "4885c9"  # mark: test rcx, rcx
    "740b"  # je next
    "4c29c0"  # sub rax, r8
    "48c1e803"  # shr rax, 3
    "480fab01"  # bts [rcx], rax
    "4883c708"  # next: add rdi, 8
    "48ffce"  # dec rsi
    "75d8"  # jne again
    "c3"  # ended: ret
)
MACHINE_CODE: Final = {"x86_64": (_BATCH, _RELEASE, _MARK)}


class Code:
    """The machine code, mapped executable, and a buffer for its arguments; neither is part of what is replaced."""

    ROOM: Final = 1 << 16

    def __init__(self, batch: bytes, release: bytes, mark: bytes) -> None:
        # shared mappings aren't among the private memory that is replaced
        self._page = mmap.mmap(-1, PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
        self._page.write(batch + release + mark)
        self.address = address_of(self._page)
        self._buffer = mmap.mmap(-1, self.ROOM, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.address), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "mprotect")
        pointer, number, word = ctypes.c_void_p, ctypes.c_long, ctypes.c_size_t
        self._batch = ctypes.PYFUNCTYPE(number, pointer, number)(self.address)
        self.release = ctypes.PYFUNCTYPE(number, pointer, number, word)(self.address + len(batch))
        """(pairs, count, bitmap) → how many pages were dropped"""
        mark_at = self.address + len(batch) + len(release)
        self.mark = ctypes.PYFUNCTYPE(None, pointer, number, word, pointer, word, word)(mark_at)
        """(addresses, count, value, bitmap, start, whether to store)"""

    def run(self, calls: list[tuple[int, int, int, int, int, int, int]]) -> list[int]:
        """System calls with nothing between them; their results (negative: an errno)."""
        if len(calls) * _ENTRY.size > self.ROOM:
            raise OSError(0, "too many pieces of memory")
        for index, call in enumerate(calls):
            _ENTRY.pack_into(self._buffer, index * _ENTRY.size, *call)
        self._batch(address_of(self._buffer), len(calls))
        return [_ENTRY.unpack_from(self._buffer, index * _ENTRY.size)[0] for index in range(len(calls))]


def load() -> Code | None:
    """The machine code for this processor; None where there is none, or where nothing may be mapped executable."""
    parts = MACHINE_CODE.get(os.uname().machine)
    if parts is None or PAGE != 4096:
        return None
    try:
        return Code(*parts)
    except OSError:
        return None


def address_of(memory: mmap.mmap) -> int:
    """Where a mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
