//! A simulated QKD module pair that plays the hardware over the real transports.
