# The peer's key made the token of the segment after ours.
package nsm

default valid = false

valid {
	after := object.get(input, "index", 0) + 1
	io.jwt.verify_es256(input.path_segments[after].token, input.auth_info.certificate)
}
