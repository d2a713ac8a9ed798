/*
 * A producer for the bridge's shared-memory ring, complete: it connects, takes its ring, writes blocks,
 * wakes the bridge, keeps what is not durable, and begins again when the bridge goes away.
 * docs/ring-abi.md says why each step is as it is.
 *
 *   cc -std=c11 -O2 -I drivers/handover/include -o ring_producer examples/ring_producer.c
 *   ./ring_producer SOCKET [BLOCKS]
 *   ./ring_producer --file /dev/shm/RING [BLOCKS]
 *
 * With --file it maps the ring's file instead of taking the ring from the socket; the bridge has to be
 * configured to trust it (`file`, `trusted = true`).
 *
 * Hands over BLOCKS blocks of made-up bits (100 if not given) and ends when all of them are durable.
 * Put your module's read in the place of make_block().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "qkd_ring.h"

#define KEPT 1024u /* blocks kept for the bridge; a power of 2 */
#define MAX_KEY_BYTES 512u
#define BEAT_MS 100

/* Drawn when the module begins to number its blocks anew, and kept beside the numbers from then on. This
 * program always makes the same blocks under the same numbers. */
#define SESSION 0x51u

struct kept_block {
	struct qkd_block head;
	uint8_t key[MAX_KEY_BYTES];
};

/* At a file, `wakeup` is the FIFO, which is watched in the place of the socket too. */
struct connection {
	int socket;
	int memory_fd;
	int wakeup;
	void *memory;
	size_t bytes;
	struct qkd_ring_producer ring;
};

static struct kept_block kept[KEPT]; /* block n is kept[n % KEPT], for first <= n < made */
static uint64_t first, made;

static uint64_t monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Here your module makes a block. Numbers ascend and are never used twice. */
static void make_block(uint64_t number, struct kept_block *block)
{
	uint32_t bytes = 1 + (uint32_t)(number % 300);

	block->head = (struct qkd_block){ number, 0, 8 * bytes, 25000 };
	for (uint32_t i = 0; i < bytes; i++)
		block->key[i] = (uint8_t)(number * 37 + i);
}

/* Blocks up to `durable` are safe at the bridge: forget them. */
static void forget(uint64_t durable)
{
	if (durable == QKD_RING_NO_NUMBER)
		return;
	for (; first <= durable && first < made; first++)
		explicit_bzero(&kept[first % KEPT], sizeof kept[0]);
}

static void disconnect(struct connection *c)
{
	if (c->memory != NULL)
		munmap(c->memory, c->bytes);
	for (int i = 0; i < 3; i++) {
		int fd = (int[]){ c->socket, c->memory_fd, c->wakeup }[i];

		if (fd >= 0)
			close(fd);
	}
}

/* Maps all of the memory. 0, or -1. */
static int map(struct connection *c)
{
	struct stat file;

	if (fstat(c->memory_fd, &file) != 0)
		return -1;
	c->bytes = (size_t)file.st_size;
	c->memory = mmap(NULL, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->memory_fd, 0);
	if (c->memory == MAP_FAILED) {
		c->memory = NULL;
		return -1;
	}
	return 0;
}

/* Receives the greeting with its two descriptors and maps the ring. 0, or -1. */
static int take_ring(struct connection *c)
{
	struct qkd_greeting greeting;
	union {
		char bytes[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = { &greeting, sizeof greeting };
	struct msghdr message = { .msg_iov = &part,
				  .msg_iovlen = 1,
				  .msg_control = &control,
				  .msg_controllen = sizeof control };
	struct cmsghdr *rights;
	int fds[2];

	if (recvmsg(c->socket, &message, MSG_CMSG_CLOEXEC) != (ssize_t)sizeof greeting)
		return -1;
	rights = CMSG_FIRSTHDR(&message);
	if (rights == NULL || rights->cmsg_type != SCM_RIGHTS ||
	    rights->cmsg_len != CMSG_LEN(sizeof fds))
		return -1;
	memcpy(fds, CMSG_DATA(rights), sizeof fds);
	c->memory_fd = fds[0];
	c->wakeup = fds[1];
	if (map(c) != 0)
		return -1;
	return qkd_ring_attach(&c->ring, c->memory, c->bytes, &greeting, SESSION);
}

static int connect_to(const char *path, struct connection *c)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	*c = (struct connection){ .memory_fd = -1, .wakeup = -1 };
	c->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (c->socket < 0 || strlen(path) >= sizeof address.sun_path)
		return -1;
	strcpy(address.sun_path, path);
	if (connect(c->socket, (struct sockaddr *)&address, sizeof address) != 0)
		return -1;
	return take_ring(c);
}

/* Takes the ring that stands at `path`. 0, or -1: there is none, or it is used; the bridge makes another. */
static int take_file(const char *path, struct connection *c)
{
	char fifo[4096];

	*c = (struct connection){ .socket = -1, .wakeup = -1 };
	c->memory_fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
	/* The kernel gives the lock back when this process ends. */
	if (c->memory_fd < 0 || flock(c->memory_fd, LOCK_EX | LOCK_NB) != 0 || map(c) != 0)
		return -1;
	if (c->bytes <= QKD_RING_HEADER_BYTES)
		return -1;
	snprintf(fifo, sizeof fifo, "%s.%" PRIu64, path, qkd_ring_generation(c->memory));
	/* ENXIO if no bridge reads there: what is left of one that is gone. */
	c->wakeup = open(fifo, O_WRONLY | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);
	if (c->wakeup < 0)
		return -1;
	return qkd_ring_attach_file(&c->ring, c->memory, c->bytes, SESSION);
}

/* Waits up to BEAT_MS. Whether the bridge is still there: it sends nothing, so that anything to read
 * is its end, as is an error on a FIFO. */
static int bridge_is_there(const struct connection *c, int wait_ms)
{
	struct pollfd end = { c->socket >= 0 ? c->socket : c->wakeup, POLLIN, 0 };

	return poll(&end, 1, wait_ms) == 0;
}

/* Wakes the bridge if it sleeps. Whether the record was written. */
static int wrote(const struct connection *c, int result)
{
	const uint64_t one = 1;

	/* A FIFO that is full wakes as well as one more number in it. */
	if (result == QKD_RING_WRITTEN_WAKE && write(c->wakeup, &one, sizeof one) < 0 && errno != EAGAIN)
		return 0;
	return result == QKD_RING_WRITTEN || result == QKD_RING_WRITTEN_WAKE;
}

/* One connection: until all blocks are durable (1), or the bridge is gone (0). */
static int serve(struct connection *c, uint64_t blocks)
{
	static const char status[] = "state=running\nqber_ppm=25000\n";
	uint64_t next, dropped = 0, beat_at = 0;

	/* The rule of resending: begin with the first block above the last durable one. */
	forget(qkd_ring_resume_after(&c->ring));
	next = first;
	/* The bridge learns of the session. */
	if (!wrote(c, QKD_RING_WRITTEN_WAKE))
		return 0;
	if (!wrote(c, qkd_ring_write_status(&c->ring, status, sizeof status - 1)))
		return 0;
	for (;;) {
		uint64_t now = monotonic_ns();
		int idle = 1;

		forget(qkd_ring_durable(&c->ring));
		if (first == blocks)
			return 1;
		if (now - beat_at >= BEAT_MS * 1000000u) {
			qkd_ring_beat(&c->ring, now, QKD_RING_STATE_RUNNING, dropped);
			beat_at = now;
		}
		if (made < blocks && made - first < KEPT) {
			make_block(made, &kept[made % KEPT]);
			made++;
		}
		if (next < made) {
			const struct kept_block *block = &kept[next % KEPT];
			int result = qkd_ring_write_block(&c->ring, &block->head, block->key);

			if (wrote(c, result)) {
				next++;
				idle = 0;
			} else if (result != QKD_RING_FULL) {
				return 0;
			}
		}
		if (!bridge_is_there(c, idle ? 1 : 0))
			return 0;
	}
}

int main(int argc, char **argv)
{
	int is_file = argc > 1 && strcmp(argv[1], "--file") == 0;
	const char *path = argc > 1 + is_file ? argv[1 + is_file] : NULL;
	uint64_t blocks = argc > 2 + is_file ? strtoull(argv[2 + is_file], NULL, 10) : 100;

	if (path == NULL) {
		fprintf(stderr, "usage: %s SOCKET [BLOCKS]\n       %s --file FILE [BLOCKS]\n", argv[0], argv[0]);
		return 2;
	}
	/* A FIFO that nobody reads is an error, not our end. */
	signal(SIGPIPE, SIG_IGN);
	for (;;) {
		struct connection c;
		int done = 0;

		if ((is_file ? take_file(path, &c) : connect_to(path, &c)) == 0) {
			done = serve(&c, blocks);
			/* What became durable just before the bridge went away is not sent again. */
			forget(qkd_ring_durable(&c.ring));
		}
		disconnect(&c);
		if (done)
			return 0;
		/* Not there, or gone: try again, and never in a tight loop. */
		poll(NULL, 0, 100);
	}
}
