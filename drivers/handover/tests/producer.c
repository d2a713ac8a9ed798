/* A vendor's producer: takes a ring on descriptor 0 and its greeting as hexadecimal text, fills it
 * with blocks until all of them are written. Exit status 0 if all went well. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "qkd_ring.h"

#define BLOCKS 2000u

static int unhex(const char *text, uint8_t *out, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		unsigned int byte;

		if (sscanf(text + 2 * i, "%2x", &byte) != 1)
			return -1;
		out[i] = (uint8_t)byte;
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct qkd_ring_producer producer;
	struct qkd_greeting greeting;
	struct stat file;
	static uint8_t key[512];
	void *memory;

	if (qkd_crc32c(0, "123456789", 9) != 0xe3069283u)
		return 2;
	if (argc != 2 || unhex(argv[1], (uint8_t *)&greeting, sizeof greeting) != 0)
		return 3;
	if (fstat(0, &file) != 0)
		return 4;
	memory = mmap(NULL, (size_t)file.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, 0, 0);
	if (memory == MAP_FAILED)
		return 5;
	if (qkd_ring_attach(&producer, memory, (size_t)file.st_size, &greeting, 0x5e55) != 0)
		return 6;
	qkd_ring_beat(&producer, 42, QKD_RING_STATE_RUNNING, 0);
	if (qkd_ring_write_status(&producer, "state=running\n", 14) < 0)
		return 7;
	for (uint32_t number = 0; number < BLOCKS; number++) {
		struct qkd_block block = { number, -1, 8 * (number % 400), QKD_RING_QBER_UNKNOWN };
		int result;

		memset(key, (int)(number & 0xff), sizeof key);
		do {
			result = qkd_ring_write_block(&producer, &block, key);
		} while (result == QKD_RING_FULL);
		if (result < 0)
			return 8;
	}
	while (qkd_ring_write_end(&producer) == QKD_RING_FULL)
		;
	while (qkd_ring_durable(&producer) != BLOCKS - 1)
		;
	return 0;
}
