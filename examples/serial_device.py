#!/usr/bin/env python3
"""A QKD module on a serial line, written from docs/serial-protocol.md and nothing else.

    serial_device.py --link /tmp/tx-1           play it on a pseudo-terminal, with a link to its end
    serial_device.py --port /dev/ttyUSB0        play it on a real port
    serial_device.py --examples                 print the frames of section 9 and end

It hands over --blocks blocks of made-up bits, ends when all of them are durable at the host, and can
lose every --lose-th frame in either direction and pull its own cable on the way. For reading and for
bring-up: its key is no secret, and it runs at a fraction of the speed of firmware.
"""

import argparse
import os
import select
import struct
import sys
import termios
import time
import tty

HELLO, KEY, STATUS, CREDIT, END = 1, 2, 3, 4, 5
RESEND, GREET, END_HEARD = 1, 2, 4
UNKNOWN_QBER = 0xFFFFFFFF
MAX_LINE_BYTES = 65821
TIMER_S = 0.2


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ 0x82F63B78 if crc & 1 else crc >> 1
    return crc ^ 0xFFFFFFFF


def cobs_encode(data):
    out, group = bytearray(), bytearray()
    for byte in data:
        if byte == 0:
            out += bytes([len(group) + 1]) + group
            group.clear()
            continue
        group.append(byte)
        if len(group) == 254:
            out += b"\xff" + group
            group.clear()
    return bytes(out + bytes([len(group) + 1]) + group)


def cobs_decode(data):
    """The bytes, or None if `data` is not COBS."""
    out, at = bytearray(), 0
    while at < len(data):
        code, group = data[at], data[at + 1 : at + data[at]]
        if code == 0 or 0 in group or len(group) != code - 1:
            return None
        out += group
        at += code
        if code < 255 and at < len(data):
            out.append(0)
    return bytes(out)


def frame(kind, flags, session, seq, payload):
    head = struct.pack("<BBHIQI", 1, kind, flags, session, seq, len(payload))
    return head + payload + struct.pack("<I", crc32c(head + payload))


def on_the_line(raw):
    return b"\0" + cobs_encode(raw) + b"\0"


def parse(raw):
    """(type, flags, session, sequence number, payload), or None for what is to be dropped."""
    if raw is None or len(raw) < 24 or crc32c(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
        return None
    version, kind, flags, session, seq, length = struct.unpack("<BBHIQI", raw[:20])
    if version != 1 or length != len(raw) - 24:
        return None
    return kind, flags, session, seq, raw[20:-4]


def key_payload(number, generated_at_ns, bits, qber_ppm, key):
    assert len(key) == (bits + 7) // 8
    return struct.pack("<QqII", number, generated_at_ns, bits, qber_ppm) + key


def credit_payload(durable, received, window):
    return struct.pack("<QQI", durable, received, window)


def block(number):
    """A block of made-up bits: its payload."""
    key = bytes((number * 37 + i) % 256 for i in range(1 + number % 300))
    return key_payload(number, time.time_ns(), 8 * len(key), UNKNOWN_QBER, key)


class Device:
    """Section 7."""

    def __init__(self, name, session, blocks):
        self.name, self.session = name, session
        self.kept = blocks
        self.first = self.next = self.fresh = 1
        self.received = self.window_end = 0
        self.greeted, self.hello_due, self.status_due = False, True, True
        self.end_due, self.end_heard = True, False
        self.timer_at = time.monotonic() + TIMER_S

    @property
    def last(self):
        return self.first + len(self.kept) - 1

    def plugged(self):
        self.greeted, self.window_end, self.hello_due = False, 0, True
        self.next = max(self.first, self.received + 1)

    def take(self, kind, flags, session, payload):
        if kind != CREDIT or len(payload) != 20:
            return
        durable, received, window = struct.unpack("<QQI", payload)
        self.hello_due |= bool(flags & GREET)
        if session != self.session or durable > received or received >= self.fresh:
            return
        self.greeted, self.received = True, received
        self.hello_due |= received + 1 < self.first
        if flags & RESEND:
            self.next = max(self.first, received + 1)
        while self.first <= durable:
            self.kept.pop(0)
            self.first += 1
        self.end_heard |= bool(flags & END_HEARD) and received == self.last
        self.window_end = received + window
        self.next = max(self.next, received + 1, self.first)
        self.timer_at = time.monotonic() + TIMER_S

    def next_frame(self):
        if self.hello_due:
            self.hello_due = False
            return frame(HELLO, 0, self.session, self.first, self.name.encode())
        if self.status_due:
            self.status_due = False
            return frame(STATUS, 0, self.session, 0, b"state=running\nqber_ppm=25000\n")
        if self.greeted and self.next <= self.last:
            if self.next > self.window_end:
                return None
            seq, self.next = self.next, self.next + 1
            self.fresh = max(self.fresh, self.next)
            return frame(KEY, 0, self.session, seq, self.kept[seq - self.first])
        if self.greeted and self.end_due:
            self.end_due = False
            return frame(END, 0, self.session, self.last, b"")
        return None

    def look_at_timer(self):
        if time.monotonic() >= self.timer_at:
            self.hello_due, self.next = True, max(self.first, self.received + 1)
            self.end_due = not self.end_heard
            self.timer_at = time.monotonic() + TIMER_S

    def is_done(self):
        return not self.kept and self.end_heard


class Line:
    """A port, or a pseudo-terminal with a link to the host's end."""

    def __init__(self, port, link, lose):
        self.link, self.lose, self.count = link, lose, 0
        self.slave = None
        if link:
            self.fd, self.slave = os.openpty()
            tty.setraw(self.slave)
            os.symlink(os.ttyname(self.slave), link)
        else:
            self.fd = os.open(port, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(self.fd)
            mode = termios.tcgetattr(self.fd)
            mode[2] |= termios.CRTSCTS | termios.CLOCAL
            mode[4] = mode[5] = termios.B3000000
            termios.tcsetattr(self.fd, termios.TCSANOW, mode)
        os.set_blocking(self.fd, False)
        self.held = bytearray()

    def close(self):
        if self.link:
            os.unlink(self.link)
            os.close(self.slave)
        os.close(self.fd)

    def is_lost(self):
        self.count += 1
        return self.lose and self.count % self.lose == 0

    def send(self, raw):
        rest = b"" if self.is_lost() else on_the_line(raw)
        while rest:
            select.select([], [self.fd], [])
            rest = rest[os.write(self.fd, rest) :]

    def receive(self, patience_s):
        if select.select([self.fd], [], [], patience_s)[0]:
            self.held += os.read(self.fd, 4096)
        while 0 in self.held:
            piece, _, self.held = self.held.partition(b"\0")
            if piece and not self.is_lost():
                parsed = parse(cobs_decode(bytes(piece)))
                if parsed:
                    yield parsed
        if len(self.held) > MAX_LINE_BYTES:
            self.held.clear()


def play(args):
    device = Device("tx-1", args.session, [block(number) for number in range(args.blocks)])
    line = Line(args.port, args.link, args.lose)
    unplug_at = args.unplug_after
    while not device.is_done():
        for kind, flags, session, _, payload in line.receive(0.01):
            device.take(kind, flags, session, payload)
        device.look_at_timer()
        while (raw := device.next_frame()) is not None:
            line.send(raw)
        if unplug_at and device.received >= unplug_at:
            unplug_at = None
            line.close()
            time.sleep(0.2)
            line = Line(args.port, args.link, args.lose)
            device.plugged()
    line.close()


def examples():
    key = key_payload(4096, 1767225600 * 10**9, 12, 25000, bytes([0xAB, 0xC0]))
    return {
        "greet": frame(CREDIT, GREET, 0, 0, credit_payload(0, 0, 256)),
        "hello": frame(HELLO, 0, 7, 1, b"tx-1"),
        "credit": frame(CREDIT, RESEND, 7, 0, credit_payload(0, 0, 256)),
        "key": frame(KEY, 0, 7, 1, key),
        "status": frame(STATUS, 0, 7, 0, b"state=running\nqber_ppm=25000\n"),
        "durable": frame(CREDIT, 0, 7, 0, credit_payload(1, 1, 255)),
        "end": frame(END, 0, 7, 1, b""),
    }


def main():
    assert crc32c(b"123456789") == 0xE3069283
    parser = argparse.ArgumentParser()
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--link", help="make a pseudo-terminal, and a link to the host's end here")
    where.add_argument("--port", help="a serial port")
    where.add_argument("--examples", action="store_true", help="print the documented frames")
    parser.add_argument("--session", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--lose", type=int, default=0, help="lose every so many frames")
    parser.add_argument("--unplug-after", type=int, help="pull the cable once at this block")
    args = parser.parse_args()
    if args.examples:
        for name, raw in examples().items():
            assert parse(cobs_decode(cobs_encode(raw))) is not None
            print(name, raw.hex(), on_the_line(raw).hex())
        return 0
    play(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
