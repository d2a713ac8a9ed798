/*
 * The shared-memory ring through which a QKD module hands key blocks to QKD Bridge: layout, and a
 * producer in plain C11 that a vendor may use as it is.
 *
 * How it goes
 *
 *   1. Connect to the bridge's Unix socket (SOCK_SEQPACKET). The bridge checks the user.
 *   2. Receive one message: 40 bytes (struct qkd_greeting) with two descriptors (SCM_RIGHTS), first
 *      the sealed memfd of the ring, then the eventfd that wakes the bridge. Send nothing.
 *   3. Map the memfd (its whole size, shared, read-write), call qkd_ring_attach() with your session,
 *      and write the 8-byte integer 1 to the eventfd. The session is a number that the module draws
 *      when it begins to number its blocks anew, and keeps until it does so again; never 0.
 *   4. Write blocks in ascending order of number, beginning with the first one above
 *      qkd_ring_resume_after(). When a write returns QKD_RING_WRITTEN_WAKE, write the 8-byte integer 1 to the
 *      eventfd. When it returns QKD_RING_FULL, try again later.
 *   5. Forget a block only when qkd_ring_durable(), or the greeting of a later connection, names it
 *      or a later one. That the bridge has read a block is not enough.
 *   6. When the socket is closed by the bridge, unmap, close all three descriptors and begin again.
 *
 * Where the bridge is configured to trust the producer with a file (a path in /dev/shm) there is no socket:
 *
 *   1. Open the file, read and write, and lock it: flock(fd, LOCK_EX | LOCK_NB). Map its whole size.
 *   2. Take the generation from qkd_ring_generation() and open the FIFO PATH.GENERATION (in decimal) with
 *      O_WRONLY | O_NONBLOCK. It is eventfd and socket in one: write to it where it says eventfd above;
 *      POLLERR on it means that the bridge has ended the ring. Ignore SIGPIPE.
 *   3. qkd_ring_attach_file() in the place of qkd_ring_attach(); the header is the greeting.
 *
 * If any of these fails, close all and try again later. Never truncate the file: it ends this process.
 *
 * One producer per ring. The memory is little-endian and so must the machine be. Needs GCC or Clang.
 *
 * A key block's first bit is the top bit of its first byte; unused bits of its last byte are zero.
 */
#ifndef QKD_RING_H
#define QKD_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the ring is little-endian"
#endif

#define QKD_RING_VERSION 1u
#define QKD_RING_HEADER_BYTES 4096u
#define QKD_RING_RECORD_ALIGN 64u
#define QKD_RING_COPY 0x40u
#define QKD_RING_NO_NUMBER UINT64_MAX
#define QKD_RING_MAX_KEY_BITS (1u << 21)
#define QKD_RING_MAX_STATUS_BYTES 1024u
#define QKD_RING_QBER_UNKNOWN UINT32_MAX

/* The bridge's only message on the socket. */
struct qkd_greeting {
	char magic[8]; /* "QKDGREET" */
	uint32_t version; /* QKD_RING_VERSION */
	uint32_t reserved; /* 0 */
	uint64_t generation; /* equal to that in the ring's header */
	uint64_t last_durable; /* highest durable block number, or QKD_RING_NO_NUMBER */
	uint64_t session; /* that last_durable belongs to, or 0 */
};

/* The first page of the memory. The bridge writes it, except for the producer's line. */
struct qkd_ring_header {
	char magic[8]; /* 0x000 "QKDRING1" */
	uint32_t version; /* 0x008 QKD_RING_VERSION */
	uint32_t header_bytes; /* 0x00c QKD_RING_HEADER_BYTES */
	uint64_t capacity; /* 0x010 bytes of data that follow the header, a power of 2 */
	uint64_t generation; /* 0x018 */
	uint8_t device[16]; /* 0x020 */
	uint8_t pad0[0x50];

	/* The producer's line. */
	_Atomic uint64_t write_pos; /* 0x080 bytes written since the ring began; never wraps */
	_Atomic uint64_t heartbeat_ns; /* 0x088 the producer's monotonic clock */
	_Atomic uint32_t state; /* 0x090 enum qkd_ring_state */
	uint32_t reserved0; /* 0x094 0 */
	_Atomic uint64_t dropped; /* 0x098 blocks dropped for want of room */
	_Atomic uint64_t session; /* 0x0a0 the numbering that the blocks belong to, never 0 */
	uint8_t pad1[0x58];

	/* The consumer's line. */
	_Atomic uint64_t read_pos; /* 0x100 bytes read since the ring began; never wraps */
	uint64_t reserved1; /* 0x108 0 */
	_Atomic uint64_t durable; /* 0x110 highest durable block number, or QKD_RING_NO_NUMBER */
	_Atomic uint64_t durable_session; /* 0x118 the session that it belongs to, or 0 */
	uint8_t pad2[0x20];
	uint64_t copies[8]; /* 0x140 in a file: the consumer's line again, QKD_RING_COPY further on */

	_Atomic uint32_t need_wakeup; /* 0x180 not 0 while the bridge sleeps, or is about to */
};

enum qkd_ring_state {
	QKD_RING_STATE_UNKNOWN = 0,
	QKD_RING_STATE_STARTING = 1,
	QKD_RING_STATE_RUNNING = 2,
	QKD_RING_STATE_FAULT = 3,
	QKD_RING_STATE_STOPPED = 4
};

/* Begins at a multiple of QKD_RING_RECORD_ALIGN; the payload may run over the end of the data to
 * its beginning. */
struct qkd_ring_record {
	uint32_t len; /* bytes of payload, at least 1 */
	uint32_t kind; /* enum qkd_ring_kind */
	uint64_t seq; /* 0, 1, 2, ... in every ring */
	uint64_t generation; /* the ring's */
	uint32_t crc; /* CRC-32C of the 24 bytes before and of the payload */
	uint32_t reserved; /* 0 */
};

enum qkd_ring_kind {
	QKD_RING_KIND_KEY = 1, /* struct qkd_block, then the key */
	QKD_RING_KIND_STATUS = 2, /* lines of text: state=running, qber_ppm=..., key_rate_bps=..., */
				  /* temperature_mc=... */
	QKD_RING_KIND_END = 3 /* one zero byte: no more blocks come */
};

/* What stands before the key. */
struct qkd_block {
	uint64_t number; /* ascending, equal at both ends of the pair, not QKD_RING_NO_NUMBER */
	int64_t generated_at_ns; /* since 1970-01-01 UTC; 0 if unknown */
	uint32_t key_bits; /* at most QKD_RING_MAX_KEY_BITS; 0 for a block given up */
	uint32_t qber_ppm; /* 0 to 1000000, or QKD_RING_QBER_UNKNOWN */
};

_Static_assert(sizeof(struct qkd_greeting) == 40, "greeting");
_Static_assert(offsetof(struct qkd_ring_header, write_pos) == 0x080, "producer's line");
_Static_assert(offsetof(struct qkd_ring_header, read_pos) == 0x100, "consumer's line");
_Static_assert(offsetof(struct qkd_ring_header, session) == 0x0a0, "producer's line");
_Static_assert(offsetof(struct qkd_ring_header, durable) == 0x110, "consumer's line");
_Static_assert(offsetof(struct qkd_ring_header, copies) == 0x140, "consumer's line, copied");
_Static_assert(offsetof(struct qkd_ring_header, need_wakeup) == 0x180, "a line of its own");
_Static_assert(sizeof(struct qkd_ring_record) == 32, "record");
_Static_assert(sizeof(struct qkd_block) == 24, "block");
_Static_assert(sizeof(_Atomic uint64_t) == 8 && sizeof(_Atomic uint32_t) == 4, "plain atomics");

/* A producer's own memory of the ring. */
struct qkd_ring_producer {
	struct qkd_ring_header *header;
	uint8_t *data;
	uint64_t capacity;
	uint64_t generation;
	uint64_t session;
	uint64_t write_pos;
	uint64_t read_seen;
	uint64_t seq;
	uint64_t resume_after;
	int in_file;
};

enum qkd_ring_result {
	QKD_RING_WRITTEN = 0, /* written */
	QKD_RING_WRITTEN_WAKE = 1, /* written, and the bridge sleeps: write 1 to the eventfd */
	QKD_RING_FULL = -1, /* nothing written; try again later */
	QKD_RING_INVALID = -2, /* nothing written; the record can never be */
	QKD_RING_BROKEN = -3 /* nothing written; close the connection */
};

/* Begins to write to the memory mapped at `memory`, `bytes` long, blocks that are numbered in `session`.
 * 0, or QKD_RING_BROKEN if it is not the ring of this greeting. Wake the bridge after this. */
static inline int qkd_ring_attach(struct qkd_ring_producer *p, void *memory, size_t bytes,
				  const struct qkd_greeting *greeting, uint64_t session)
{
	struct qkd_ring_header *header = memory;

	if (session == 0 || memcmp(greeting->magic, "QKDGREET", 8) != 0 || greeting->version != QKD_RING_VERSION)
		return QKD_RING_BROKEN;
	if (bytes <= QKD_RING_HEADER_BYTES || memcmp(header->magic, "QKDRING1", 8) != 0 ||
	    header->version != QKD_RING_VERSION || header->header_bytes != QKD_RING_HEADER_BYTES ||
	    header->capacity != bytes - QKD_RING_HEADER_BYTES ||
	    (header->capacity & (header->capacity - 1)) != 0 ||
	    header->generation != greeting->generation || atomic_load(&header->write_pos) != 0)
		return QKD_RING_BROKEN;
	p->header = header;
	p->data = (uint8_t *)memory + QKD_RING_HEADER_BYTES;
	p->capacity = header->capacity;
	p->generation = greeting->generation;
	p->session = session;
	p->write_pos = 0;
	p->read_seen = 0;
	p->seq = 0;
	p->in_file = 0;
	p->resume_after = greeting->session == session ? greeting->last_durable : QKD_RING_NO_NUMBER;
	/* Before the first record, which publishes it. */
	atomic_store_explicit(&header->session, session, memory_order_relaxed);
	return 0;
}

/* Loads a word of the bridge's. In a file the bridge writes it by a system call, which need not be whole, and
 * therefore twice: 0 while the two differ, and what was known before still holds. */
static inline int qkd_ring_heard(const struct qkd_ring_producer *p, const _Atomic uint64_t *word, uint64_t *value)
{
	*value = atomic_load_explicit(word, memory_order_acquire);
	return !p->in_file ||
	       *value == atomic_load_explicit(word + QKD_RING_COPY / sizeof *word, memory_order_acquire);
}

/* The generation of the ring mapped at `memory`, for the name of its FIFO. */
static inline uint64_t qkd_ring_generation(const void *memory)
{
	return ((const struct qkd_ring_header *)memory)->generation;
}

/* As qkd_ring_attach(), for a ring in a file: the greeting is in its header. A ring that another producer has
 * used is QKD_RING_BROKEN; the bridge puts a new one in its place. */
static inline int qkd_ring_attach_file(struct qkd_ring_producer *p, void *memory, size_t bytes, uint64_t session)
{
	struct qkd_ring_header *header = memory;
	struct qkd_greeting greeting = { "QKDGREE", QKD_RING_VERSION, 0, 0, 0, 0 };

	greeting.magic[7] = 'T';
	if (bytes <= QKD_RING_HEADER_BYTES || atomic_load(&header->session) != 0)
		return QKD_RING_BROKEN;
	greeting.generation = header->generation;
	p->in_file = 1;
	if (!qkd_ring_heard(p, &header->durable_session, &greeting.session) ||
	    !qkd_ring_heard(p, &header->durable, &greeting.last_durable) ||
	    qkd_ring_attach(p, memory, bytes, &greeting, session) != 0)
		return QKD_RING_BROKEN;
	p->in_file = 1;
	return 0;
}

/* CRC-32C (Castagnoli), continued from `crc`; begin with 0. Bit by bit: replace it where speed
 * matters. Check value of "123456789": 0xe3069283. */
static inline uint32_t qkd_crc32c(uint32_t crc, const void *bytes, size_t count)
{
	const uint8_t *byte = bytes;

	crc = ~crc;
	while (count--) {
		crc ^= *byte++;
		for (int bit = 0; bit < 8; bit++)
			crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1u)));
	}
	return ~crc;
}

static inline void qkd_ring_copy_in(struct qkd_ring_producer *p, uint64_t pos, const void *bytes,
				    size_t count)
{
	uint64_t at = pos & (p->capacity - 1);
	size_t first = count;

	if (first > p->capacity - at)
		first = (size_t)(p->capacity - at);
	memcpy(p->data + at, bytes, first);
	memcpy(p->data, (const uint8_t *)bytes + first, count - first);
}

/* Writes one record whose payload is `head` followed by `tail`. */
static inline int qkd_ring_write(struct qkd_ring_producer *p, uint32_t kind, const void *head,
				 size_t head_bytes, const void *tail, size_t tail_bytes)
{
	size_t len = head_bytes + tail_bytes;
	uint64_t need = (sizeof(struct qkd_ring_record) + len + QKD_RING_RECORD_ALIGN - 1) &
			~(uint64_t)(QKD_RING_RECORD_ALIGN - 1);
	struct qkd_ring_record record = { (uint32_t)len, kind, p->seq, p->generation, 0, 0 };
	uint64_t start = p->write_pos;
	uint64_t read_pos;

	if (len == 0 || need > p->capacity)
		return QKD_RING_INVALID;
	/* Acquire: the bridge has wiped what it gives back before we write there. */
	if (!qkd_ring_heard(p, &p->header->read_pos, &read_pos))
		read_pos = p->read_seen;
	if (read_pos > start || start - read_pos > p->capacity)
		return QKD_RING_BROKEN;
	p->read_seen = read_pos;
	if (p->capacity - (start - read_pos) < need)
		return QKD_RING_FULL;

	record.crc = qkd_crc32c(0, &record, 24);
	record.crc = qkd_crc32c(record.crc, head, head_bytes);
	record.crc = qkd_crc32c(record.crc, tail, tail_bytes);
	qkd_ring_copy_in(p, start + sizeof record, head, head_bytes);
	qkd_ring_copy_in(p, start + sizeof record + head_bytes, tail, tail_bytes);
	qkd_ring_copy_in(p, start, &record, sizeof record);

	p->seq += 1;
	p->write_pos = start + need;
	/* Release: the bridge sees the record before it sees the position. */
	atomic_store_explicit(&p->header->write_pos, p->write_pos, memory_order_release);
	/* Either we see that the bridge wants to sleep, or it sees the record before it does. */
	atomic_thread_fence(memory_order_seq_cst);
	return atomic_load_explicit(&p->header->need_wakeup, memory_order_relaxed) != 0 ?
		       QKD_RING_WRITTEN_WAKE :
		       QKD_RING_WRITTEN;
}

/* Writes a key block of block->key_bits bits, the last byte's unused bits zero. */
static inline int qkd_ring_write_block(struct qkd_ring_producer *p, const struct qkd_block *block,
				       const uint8_t *key)
{
	size_t key_bytes = ((size_t)block->key_bits + 7) / 8;

	if (block->number == QKD_RING_NO_NUMBER || block->key_bits > QKD_RING_MAX_KEY_BITS)
		return QKD_RING_INVALID;
	return qkd_ring_write(p, QKD_RING_KIND_KEY, block, sizeof *block, key, key_bytes);
}

/* Writes a status of 1 to QKD_RING_MAX_STATUS_BYTES bytes of text. */
static inline int qkd_ring_write_status(struct qkd_ring_producer *p, const char *text, size_t bytes)
{
	if (bytes > QKD_RING_MAX_STATUS_BYTES)
		return QKD_RING_INVALID;
	return qkd_ring_write(p, QKD_RING_KIND_STATUS, text, bytes, "", 0);
}

/* Writes that no more blocks come. */
static inline int qkd_ring_write_end(struct qkd_ring_producer *p)
{
	return qkd_ring_write(p, QKD_RING_KIND_END, "", 1, "", 0);
}

/* Says that this process lives; call it about ten times a second. */
static inline void qkd_ring_beat(struct qkd_ring_producer *p, uint64_t monotonic_ns,
				 enum qkd_ring_state state, uint64_t dropped_blocks)
{
	atomic_store_explicit(&p->header->heartbeat_ns, monotonic_ns, memory_order_relaxed);
	atomic_store_explicit(&p->header->state, (uint32_t)state, memory_order_relaxed);
	atomic_store_explicit(&p->header->dropped, dropped_blocks, memory_order_relaxed);
}

/* Highest block number of this session that the bridge holds durably, or QKD_RING_NO_NUMBER, which says
 * nothing new. */
static inline uint64_t qkd_ring_durable(const struct qkd_ring_producer *p)
{
	uint64_t session, number;

	/* Acquire: a number that was left from the session before is not seen after this. */
	if (!qkd_ring_heard(p, &p->header->durable_session, &session) || session != p->session)
		return QKD_RING_NO_NUMBER;
	return qkd_ring_heard(p, &p->header->durable, &number) ? number : QKD_RING_NO_NUMBER;
}

/* Number of the last block of this session that need not be sent again, or QKD_RING_NO_NUMBER if all
 * that are kept have to be. */
static inline uint64_t qkd_ring_resume_after(const struct qkd_ring_producer *p)
{
	return p->resume_after;
}

#endif
