package server

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// wire is gRPC's own codec of messages.
var wire = encoding.GetCodecV2(proto.Name)

// encoded is a unary answer on its way. It is encoded while the processor has at hand
// what it is made of, and not after the wait for the record of its call.
type encoded struct{ data mem.BufferSlice }

func encode(answer any) (*encoded, error) {
	data, err := wire.Marshal(answer)
	return &encoded{data}, err
}

// free is for an answer that is not sent after all.
func (e *encoded) free() {
	if e != nil {
		e.data.Free()
	}
}

// codec is wire, but for answers that are encoded already.
type codec struct{ encoding.CodecV2 }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if e, ok := v.(*encoded); ok {
		return e.data, nil
	}
	return c.CodecV2.Marshal(v)
}
